"""Images a second in fine-tuning an EfficientNet-Lite0: this package and two loops of others.

One is the loop of PyTorch's tutorial on transfer learning, in our words: single precision, its
transforms, a number asked for after every step. The other is that of timm's training script, from
timm's own parts, with the flags that make it most like ours:

    --opt adamw --lr 1e-4 --weight-decay 0.01 --layer-decay 0.5 --clip-grad 1 --smoothing 0
    --sched cosine --sched-on-updates --amp --amp-dtype bfloat16 --channels-last
    --scale 0.5 1 --color-jitter 0 --train-interpolation bilinear

All have the same images, batch, weights and threads, and no processes that read images; the rounds
are interleaved. Stage one is compared with ten epochs of the tutorial's "feature extractor", which
runs the whole body in each, on crops that are new each time; ours runs it once, on the middle of
each image, and fits the head.
"""

import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, dispatch_clip_grad
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
from metautils.precision import half

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, EPOCHS, BATCH = 5, 10, 32
BODY = pretrained.body(pretrained.LITE0)


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


def network():
    """timm's own network with two classes and the weights of the body."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=2)
    net.load_state_dict(BODY.net.state_dict(), strict=False)  # all but the head
    return net


def tutorial(root, size, batch, frozen):
    """An epoch of the tutorial, ready to be timed."""
    told = BODY.net.pretrained_cfg
    change = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    change += [transforms.ToTensor(), transforms.Normalize(told["mean"], told["std"])]
    images = ImageFolder(str(root / "train"), transforms.Compose(change))
    loader = DataLoader(images, batch, shuffle=True)
    net = network().to(DEVICE).requires_grad_(not frozen)
    net.classifier.requires_grad_(True)
    optimizer = SGD((w for w in net.parameters() if w.requires_grad), 1e-3, momentum=0.9)
    return lambda: plain(net, loader, optimizer)


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


def script(root, size, batch, frozen=False, amp=True):
    """An epoch of timm's script, ready to be timed."""
    told = BODY.net.pretrained_cfg
    loader = create_loader(
        create_dataset("", root, split="train", is_training=True),
        (3, size, size),
        batch,
        is_training=True,
        scale=(0.5, 1.0),
        color_jitter=0.0,
        interpolation="bilinear",
        mean=told["mean"],
        std=told["std"],
        num_workers=0,
        device=DEVICE,
    )
    net = network().to(DEVICE, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, "adamw", 1e-4, 0.01, layer_decay=0.5)
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=100, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    dtype = half(DEVICE) if amp else None
    return lambda: scripted(net, loader, optimizer, schedule, dtype)


def scripted(net, loader, optimizer, schedule, dtype):
    """An epoch as timm's script goes about it."""
    losses, lose = AverageMeter(), nn.CrossEntropyLoss()
    amp = partial(torch.autocast, DEVICE.type, dtype) if dtype else nullcontext
    net.train()
    for k, (inputs, labels) in enumerate(loader, start=1):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with amp():
            loss = lose(net(inputs), labels)
        loss.backward()
        dispatch_clip_grad(model_parameters(net), 1.0)
        optimizer.step()
        losses.update(loss.item(), inputs.size(0))
        optimizer.zero_grad()
        schedule.step_update(k, losses.avg)
    return losses.avg


def ours(root, size, batch, frozen):
    """One epoch of stage two, or stage one with its features."""
    recipe = Recipe(size=size, batch=batch, epochs=1)
    split = labelled.load(root)
    net = Classifier(pretrained.body(pretrained.LITE0), split.train.classes, size).to(DEVICE)
    if frozen:
        return lambda: finetune.stage_one(net, split, recipe)
    probe = finetune.stage_one(net, split, recipe)
    return lambda: finetune.stage_two(net, split, recipe, probe)


def seconds(epoch):
    start = time.perf_counter()
    epoch()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size, batch, frozen):
    """Medians of interleaved rounds: images a second of each, and how often faster ours is."""
    sides = {name: side for name, side in SIDES.items() if not frozen or name in ALSO_FROZEN}
    with tempfile.TemporaryDirectory() as temporary:
        root = folder(Path(temporary) / "photographs", 256)
        ready = {name: side(root, size, batch, frozen) for name, side in sides.items()}
        times = []
        for k in range(ROUNDS + 1):  # the first one warms up; every other goes backwards
            order = sides if k % 2 else reversed(sides)
            times.append({name: seconds(ready[name]) for name in order})
    # Ours reads the validation images as well, which is counted as its loss.
    images = {name: 2 * BATCH * (EPOCHS if frozen and name == OURS else 1) for name in sides}
    rates = [{name: images[name] / t for name, t in row.items()} for row in times[1:]]
    cells = []
    for name in SIDES:
        rate = [row.get(name) for row in rates]
        cells.append(f"{median(rate):.0f}" if name in sides else "")
        if name != OURS:
            faster = [row[OURS] / x for row, x in zip(rates, rate, strict=True) if x]
            cells.append(f"{median(faster):.2f} x" if faster else "")
    print(size, batch, frozen, *cells, sep=" | ", flush=True)
    return cells


OURS, TUTORIAL = "metautils", "the tutorial"
SIDES = {
    OURS: ours,
    "timm, --amp": script,
    "timm, float32": partial(script, amp=False),
    TUTORIAL: tutorial,
}
ALSO_FROZEN = (OURS, TUTORIAL)
WHAT = (
    "Fine-tuning an EfficientNet-Lite0, images a second and how many times as fast metautils "
    f"is; medians of {ROUNDS} interleaved rounds. Stage two of metautils: AdamW with a rate for "
    "each stage, gradients cut to a norm of 1, fixed batch statistics, channels last, bfloat16 "
    "but for convolutions by channel on a CPU, crops of half of the image or more on bytes, the "
    "loss asked for once an epoch, four validation images before and after it. timm's script: "
    "moving batch statistics, a rate for each block, bfloat16 throughout or float32, the same "
    "crops by Pillow, the loss asked for after every step, no validation; the rest alike. The "
    "tutorial: SGD, moving batch statistics, channels first, float32, crops of 8 % or more by "
    "Pillow, the loss asked for after every step, no validation"
)


def main():
    """Measure everything and write the record."""
    made = results.provenance(DEVICE)
    rows = []
    for size in (64, 224):
        rows.append([f"stage two, batch {BATCH}", size, *measure(size, BATCH, False)])
    rows.append(["stage two, the tutorial's batch of 4", 64, *measure(64, 4, False)])
    for size in (64, 224):
        rows.append([f"stage one, {EPOCHS} epochs of theirs", size, *measure(size, BATCH, True)])
    table = {
        "title": "This package, the loop of timm's script and that of PyTorch's tutorial",
        "heads": ["Training", "Pixels", OURS, *(x for n in list(SIDES)[1:] for x in (n, "Speed"))],
        "rows": rows,
    }
    name = "speed_finetune" if DEVICE.type == "cpu" else "speed_finetune_gpu"
    write_json({"what": WHAT, "tables": [table], **made}, results.folder() / f"{name}.json")
    print(*results.tables(name).values())


if __name__ == "__main__":
    main()
