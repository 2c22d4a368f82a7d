"""Images a second in fine-tuning a ResNet-50: this package's loop and the plain one of tutorials.

The peer is the loop of PyTorch's tutorial on transfer learning, in our words: single precision,
its transforms, a number asked for after every step; at the same batch, images and threads. Ours has
bfloat16 where the processor has it, channels last, and smaller crops' range on bytes. Stage one is
compared with ten epochs of the tutorial's "feature extractor", which runs the whole body in each,
on crops that are new each time; ours runs it once, on the middle of each image, and fits the head.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from metautils import finetune, pretrained, results
from metautils.classifier import Classifier
from metautils.data import labelled
from metautils.files import write_json
from metautils.finetune import Recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, EPOCHS, BATCH = 5, 10, 32


def folder(root, size):
    """Squares of noise as JPEG, in two classes."""
    generator = torch.Generator().manual_seed(0)
    for part, count in {"train": BATCH, "validation": 2, "test": 2}.items():
        for name in "ab":
            place = root / part / name
            place.mkdir(parents=True)
            for k in range(count):
                noise = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(noise.numpy()).resize((size, size)).save(place / f"{k}.jpg")
    return root


def plain(net, loader, optimizer):
    """An epoch as the tutorial writes it."""
    net.train()
    running, right = 0.0, 0
    for inputs, labels in loader:
        inputs, labels = inputs.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        outputs = net(inputs)
        _, predictions = torch.max(outputs, 1)
        loss = F.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        running += loss.item() * inputs.size(0)
        right += torch.sum(predictions == labels)
    return running, right


def peer(root, size, batch, frozen):
    """One epoch of the peer, ready to be timed."""
    told = pretrained.IMAGENET.transforms()
    change = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    change += [transforms.ToTensor(), transforms.Normalize(told.mean, told.std)]
    images = ImageFolder(str(root / "train"), transforms.Compose(change))
    loader = DataLoader(images, batch, shuffle=True)
    body = pretrained.body(None).net.to(memory_format=torch.contiguous_format)
    body.requires_grad_(not frozen)
    net = nn.Sequential(body, nn.Linear(2048, 2)).to(DEVICE)
    optimizer = SGD((w for w in net.parameters() if w.requires_grad), 1e-3, momentum=0.9)
    return lambda: plain(net, loader, optimizer)


def ours(root, size, batch, frozen):
    """One epoch of stage two, or stage one with its features."""
    recipe = Recipe(size=size, batch=batch, epochs=1)
    split = labelled.load(root)
    net = Classifier(pretrained.body(None), split.train.classes, size).to(DEVICE)
    stage = finetune.stage_one if frozen else finetune.stage_two
    return lambda: stage(net, split, recipe)


def seconds(epoch):
    start = time.perf_counter()
    epoch()
    return time.perf_counter() - start


def measure(size, batch, frozen):
    """Medians of interleaved rounds: images a second of ours and theirs, and how often faster."""
    with tempfile.TemporaryDirectory() as temporary:
        root = folder(Path(temporary) / "photographs", 256)
        mine, theirs = (make(root, size, batch, frozen) for make in (ours, peer))
        times = [(seconds(mine), seconds(theirs)) for _ in range(ROUNDS + 1)][1:]
    # Ours reads the validation images as well, which is counted as its loss.
    epochs = EPOCHS if frozen else 1
    images = 2 * BATCH
    own = median(epochs * images / a for a, _ in times)
    other = median(images / b for _, b in times)
    ratio = median(epochs * b / a for a, b in times)
    return [f"{own:.0f}", f"{other:.0f}", f"{ratio:.1f} x"]


made = results.provenance(DEVICE)
rows = []
for size in (64, 224):
    rows.append([f"stage two, batch {BATCH}", size, *measure(size, BATCH, False)])
    rows.append([f"stage one, {EPOCHS} epochs of theirs", size, *measure(size, BATCH, True)])
rows.append(["stage two, the tutorial's batch of 4", 224, *measure(224, 4, False)])
record = {
    "what": f"Fine-tuning a ResNet-50, images a second; medians of {ROUNDS} interleaved rounds",
    "tables": [
        {
            "title": "This package and the plain loop of PyTorch's tutorial, random weights",
            "heads": ["Training", "Pixels", "metautils", "plain loop", "Speed"],
            "rows": rows,
        }
    ],
    **made,
}
name = "speed_finetune" if DEVICE.type == "cpu" else "speed_finetune_gpu"
write_json(record, results.folder() / f"{name}.json")
print(*results.tables(name).values())
