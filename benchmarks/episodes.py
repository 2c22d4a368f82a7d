"""Images a second delivered as 60-way 1-shot 5-query episodes: index gather against DataLoader.

The DataLoader is used as easyfsl does: a batch sampler yields an episode's indices, the dataset
opens, converts and shrinks each PNG, the collate function parts support from query. easyfsl 1.5's
own TaskSampler cannot be made under torch 2.15 (it hands torch's Sampler an argument that is gone),
so its two draws with `random.sample` stand here. A third rival has its images already decoded.
"""

import json
import random
import tempfile
import time
import zipfile
from itertools import chain, islice
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import resize, to_tensor

from metautils import results
from metautils.data import glyphs
from metautils.data.bank import ClassBank
from metautils.files import data_folder
from metautils.sampling import EpisodeSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # as in each of DataLoader's workers; two hinder one another when busy
WAYS, SHOTS, QUERIES, DRAWINGS, EPISODES, ROUNDS = 60, 1, 5, 20, 60, 7
WHAT = f"{WAYS}-way {SHOTS}-shot {QUERIES}-query episodes at 28x28; DataLoader with 2 workers; "


class Files(list):
    """Paths; an image is opened and shrunk when it is asked for."""

    def __getitem__(self, k):
        with Image.open(super().__getitem__(k)) as image:
            return to_tensor(resize(image.convert("L"), [28, 28]))


def collate(images):
    x = torch.stack(images).unflatten(0, (WAYS, SHOTS + QUERIES))
    y = torch.arange(WAYS)[:, None].expand(-1, SHOTS + QUERIES)
    return [part.flatten(0, 1) for z in (x, y) for part in z.split([SHOTS, QUERIES], 1)]


def loader(images: list) -> DataLoader:
    classes, draw = [range(k, k + DRAWINGS) for k in range(0, len(images), DRAWINGS)], random.sample
    rows = ([draw(c, SHOTS + QUERIES) for c in draw(classes, WAYS)] for _ in range(EPISODES))
    batches = [list(chain(*episode)) for episode in rows]
    return DataLoader(images, batch_sampler=batches, num_workers=2, collate_fn=collate)


def rate(source) -> float:
    """Images a second from the first episode on: starting the workers is not counted."""
    next(episodes := iter(source))
    start, count = time.perf_counter(), 0
    for episode in islice(episodes, EPISODES - 1):
        count += 1
        if isinstance(episode, list):  # of a DataLoader, whose images have to be taken there
            episode = [part.to(DEVICE) for part in episode]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return count * WAYS * (SHOTS + QUERIES) / (time.perf_counter() - start)


with tempfile.TemporaryDirectory() as folder:
    archive = (data_folder() or Path()) / "omniglot-py" / "images_background.zip"
    if archive.is_file():
        zipfile.ZipFile(archive).extractall(folder)
    else:
        for k, image in enumerate(255 - glyphs.generate(drawings=DRAWINGS, size=105).images):
            Image.fromarray(image[0].numpy()).save(f"{folder}/{k:06d}.png")
    files = Files(sorted(Path(folder).rglob("*.png")))
    decoded = [files[k] for k in range(len(files))]
    names = tuple(map(str, range(len(files) // DRAWINGS)))
    images = (255 * torch.stack(decoded)).round().to(torch.uint8)
    bank = ClassBank(images, torch.full((len(names),), DRAWINGS), names).to(DEVICE)
    sources = {
        "index gather": lambda: EpisodeSampler(bank, WAYS, SHOTS, QUERIES),
        "DataLoader, images decoded": lambda: loader(decoded),
        "DataLoader, PNG files": lambda: loader(files),
    }
    rounds = [{name: rate(make()) for name, make in sources.items()} for _ in range(ROUNDS)]

rates = {n: round(median(r[n] for r in rounds)) for n in sources}
ratios = {n: round(median(r["index gather"] / r[n] for r in rounds), 1) for n in sources}
rows = [[n, f"{rates[n]:,}", f"{ratios[n]} x"] for n in sources]
heads = ["Episodes from", "Images a second", "Gather is faster"]
what = WHAT + ("Omniglot's background set" if archive.is_file() else "glyphs")
what += f"; medians of {ROUNDS} interleaved rounds"
tables = [{"title": "Episodes", "heads": heads, "rows": rows}]
record = {"what": what, "tables": tables}
record |= results.provenance(DEVICE)
name = "speed_episodes" if DEVICE.type == "cpu" else "speed_episodes_gpu"
(results.folder() / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
print(results.tables(name)["Episodes"])
