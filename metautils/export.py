"""A classifier or a recogniser as a file for other programs: ONNX, or torch's own program."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.classifier import Classifier, enlarged
from metautils.errors import BadArgument
from metautils.files import check_file, save_bytes
from metautils.recognise import Recogniser

ROOM = 1 << 30  # bytes: more than a body of these has
NEEDED = ("onnx", "onnxscript")


class _Whole(nn.Module):
    """A classifier from images in [0, 1] to probabilities: what is left is to cut them out."""

    def __init__(self, net: Classifier) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """`(n, 3, size, size)` to `(n, classes)`."""
        return self.net(images).softmax(1)


class _Scores(nn.Module):
    """What a recogniser remembers, from images in [0, 1] to the scores of its classes."""

    def __init__(self, things: Recogniser) -> None:
        super().__init__()
        self.net = things.seen_by()
        # Scores are linear in a feature of length 1, whatever the head: a column for each class.
        weight = things.scores(torch.eye(things.body.features))  # (features, classes)
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        """`(n, 3, size, size)` to `(n, classes)`."""
        return F.normalize(self.net.body(images), dim=1) @ self.weight


def export(made: Classifier | Recogniser, path: Path) -> None:
    """Write it to `path`, as ONNX if that ends in `.onnx`, by `torch.export` if in `.pt2`.

    Of any number of images `(n, 3, size, size)`, RGB in [0, 1], cut out as `told` says, the file
    gives `(n, classes)`: the probabilities of a classifier, the scores of a recogniser; normalising
    is inside. The names of the classes and how to cut lie in it too, and for a recogniser the score
    up to which an image is of none: in `metadata_props` of ONNX, in the extra file
    `classifier.json` of a `.pt2`.

    Raises:
        BadArgument: if the name ends otherwise, or ONNX lacks its packages or a newer torch, or the
            recogniser knows too little to have a threshold.
        DataError: if the file cannot be written.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise BadArgument(f"--out {path} ends in neither .onnx nor .pt2: name it so.")
    if path.suffix == ".onnx":
        _check_onnx()
    check_file(path, ROOM)
    notes = told(made)
    # Traced on the CPU, where every reader can run it; the weights in memory as others expect them.
    whole = _Whole(made.cpu()) if isinstance(made, Classifier) else _Scores(made).cpu()
    whole = whole.to(memory_format=torch.contiguous_format).eval()
    write = _as_onnx if path.suffix == ".onnx" else _as_program
    with torch.no_grad():
        save_bytes(write(whole, notes), path)


def told(made: Classifier | Recogniser) -> dict[str, str]:
    """What a program must know that uses the file: classes, size and how to cut out an image."""
    own = {}
    if isinstance(made, Recogniser):
        own = {"threshold": str(made.threshold)}
    net = made if isinstance(made, Classifier) else made.seen_by()
    return {
        "classes": json.dumps(net.classes),
        "size": str(net.size),
        "images": f"RGB in [0, 1], (n, 3, {net.size}, {net.size}): scale the short side to "
        f"{enlarged(net)} pixels ({net.body.interpolation}, antialiased), cut out the middle",
        **own,
    }


def _check_onnx() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadArgument(
            f"ONNX needs {' and '.join(missing)}: `pip install {' '.join(missing)}`, or give --out "
            "a name that ends in .pt2."
        )
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise BadArgument(
            f"ONNX needs torch 2.5 or newer, and this is {torch.__version__}: give --out a name "
            "that ends in .pt2."
        )


def _example(whole: _Whole | _Scores) -> tuple[tuple[Tensor], dict]:
    """Two images, and that there may be any other number of them."""
    size = whole.net.size
    return (torch.rand(2, 3, size, size),), {"images": {0: torch.export.Dim("n")}}


def _as_onnx(whole: _Whole | _Scores, told: dict[str, str]) -> bytes:
    images, shapes = _example(whole)
    program = torch.onnx.export(
        whole,
        images,
        input_names=["images"],
        output_names=["probabilities" if isinstance(whole, _Whole) else "scores"],
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    for key, value in told.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _as_program(whole: _Whole | _Scores, told: dict[str, str]) -> bytes:
    images, shapes = _example(whole)
    file = io.BytesIO()
    program = torch.export.export(whole, images, dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={"classifier.json": json.dumps(told)})
    return file.getvalue()
