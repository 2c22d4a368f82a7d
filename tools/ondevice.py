"""Run a chapter or a benchmark without Jupyter: whole, or small on another device.

Small is for finding tensors that meet on two devices, on the tests' pretend accelerator: sizes are
cut (SMALL), and what the code asserts of its results is computed but need not hold.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from unittest import mock

from matplotlib import pyplot as plt

plt.switch_backend("agg")
ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where the package is not installed, and pretend
BENCHMARKS = sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))

# What takes long, and what stands in its place in a small run.
SMALL: dict[str, dict[str, str]] = {
    "01_concepts": {
        "tasks=200, steps=1200": "tasks=20, steps=3",
        "in (1, 5, 15)": "in (1, 5)",
        "tasks=40": "tasks=2",
        "tasks=60": "tasks=2",
        "queries=5, episodes=400": "queries=5, episodes=20",
        "steps=200": "steps=3",
        "[frame(a) for a in ALPHAS]": "[frame(ALPHAS[0])] * len(ALPHAS)",
        "(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)": "(0.01, 0.1)",
        "strengths = {}, {}, (1e-3, 1e-2, 1e-1, 1.0)": "strengths = {}, {}, (1e-2,)",
        "10, 100, 600, 99": "10, 100, 6, 99",
        "episodes, 60,": "episodes, 3,",
        "5, 100)": "5, 20)",
    },
    "02_maml": {
        "curves=2300, reused=500": "curves=3, reused=3",
        "images=100": "images=3",
        "range(10, len(seen) + 1)": "range(3, len(seen) + 1)",
        "unfold(0, 10, 1)": "unfold(0, 3, 1)",
        "COUNTS = [1, 2, 5, 10, 20]": "COUNTS = [1, 2]",
        "range(150)": "range(2)",
        "range(200)": "range(3)",
        "episodes=200": "episodes=20",
        "validation_episodes=40": "validation_episodes=5",
        "150, 6, queries": "4, 6, queries",
        "for k in range(11):": "for k in 11 * [0]:",
    },
    "03_hypergradients": {
        "SEEDS = 20": "SEEDS = 2",
        "OUTER = 12": "OUTER = 2",
        "steps=80)": "steps=3)",
        "(10, 30, 100, 300, 1000)": "(2, 1000)",
        "TS[-1] + 1": "3",
        "randn(1000, 40": "randn(4, 40",
        "(5, 30, 1000)": "(5, 1000)",
        "range(500)": "range(3)",
        "range(80)": "range(2)",
    },
    "04_learned_optimizers": {
        '"quick": 40,': '"quick": 2,',
        "LENGTHS, BATCHES = (5, 20, 50), 6": "LENGTHS, BATCHES = (1, 2, 3), 2",
        "steps=100": "steps=5",
        "range(11)": "range(2)",
        "steps=200": "steps=10",
        "140, 30, tasks": "20, 10, tasks",
        "classify(2, 8), classify(6, 9)": "classify(2, 8), classify(2, 9)",
        "{20: 20, 1000: 4}": "{20: 2, 1000: 1}",
        "few, (0.01, 0.02, 0.04), steps=80": "few, (0.01, 0.02), steps=2",
        "(adam, 250)": "(adam, 8)",
        "(old_digits, 80)": "(old_digits, 8)",
        '["learned"][80]': '["learned"][8]',
        '["Adam"][80]': '["Adam"][8]',
        "min(250, in_time)": "min(8, in_time)",
        "for _ in range(5)": "for _ in range(1)",
        "each, 300, 5)": "each, 300, 1)",
    },
    "05_lstm_meta_learner": {
        "images=300, width=16, tests=100": "images=6, width=8, tests=4",
        "unseen, 30, size": "unseen, 2, size",
    },
    "06_prototypical_networks": {
        "steps=200, trial=40, episodes=600": "steps=6, trial=1, episodes=4",
        "range(15)": "range(3)",
        "validation_episodes=10": "validation_episodes=1",
        "range(400)": "range(3)",
        "parts.train.with": "parts.train.select(range(60)).with",
        "parts.validation.with": "parts.validation.select(range(20)).with",
        "parts.validation.to": "parts.validation.select(range(20)).to",
        "parts.test.to": "parts.test.select(range(60)).to",
        "world.train.some": "world.train.select(range(60)).some",
        "world.test.to": "world.test.select(range(60)).to",
        "episodes=300": "episodes=4",
        "episodes=120": "episodes=4",
        "tasks=60": "tasks=2",
        "range(200)": "range(3)",
        "for _ in range(10)": "for _ in range(2)",
    },
    "07_relation_networks": {
        "steps=120, game=150, tests=300": "steps=3, game=3, tests=4",
        "tasks=200": "tasks=4",
        "tasks=100": "tasks=4",
        "tasks=60": "tasks=4",
        "tasks=30": "tasks=2",
        "ways, 1, 5, tasks": "ways, 1, 1, tasks",
        "seed=seed), 120": "seed=seed), 2",
    },
    "08_pretraining_finetuning": {
        "epochs=12,": "epochs=1,",
        "size=64 if QUICK": "size=32 if QUICK",
        "25 if QUICK": "2 if QUICK",
        "drawings=50": "drawings=6",
        "i < 10": "i < 4",
        '"max_iter": 200': '"max_iter": 5',
        "epochs=6)": "epochs=1)",
        "drifted(32, 6)": "drifted(32, 1)",
        "[:8].tolist()": "[:2].tolist()",
    },
    "09_few_shot_from_pretraining": {
        "SIZE = 64": "SIZE = 32",
        "TESTS = 200": "TESTS = 4",
        "range(0, 200, 5)": "range(0, 200, 20)",
        "range(0, len(unseen), 6)": "range(0, len(unseen), 24)",
        "40 if QUICK": "2 if QUICK",
        "steps=12": "steps=2",
        "photos[:25]": "photos[:3]",
    },
    "10_memory_attention": {
        "compare=120, steps=250, wrong=60": "compare=2, steps=5, wrong=3",
        "15, 600, seed=seed": "15, 20, seed=seed",
        "(net, exam, 600)": "(net, exam, 20)",
        "unfold(0, 10, 1)": "unfold(0, 3, 1)",
        "drawn, 320": "drawn, 32",
        "(net, long, 300)": "(net, long, 20)",
    },
    "benchmarks/episodes.py": {
        "\nWAYS, SHOTS": "\nROUNDS, WAYS, SHOTS",
        "EPISODES, ROUNDS = 60, 1, 5, 20, 60, 7": "EPISODES = 1, 6, 1, 5, 20, 2",
        "glyphs.generate(": "glyphs.generate(1, 8, ",
        "num_workers=2": "num_workers=0",
    },
    "benchmarks/finetune.py": {
        "ROUNDS, EPOCHS, BATCH = 5, 10, 32": "ROUNDS, EPOCHS, BATCH = 1, 1, 2",
        "(64, 224)": "(32,)",
    },
    "benchmarks/implicit.py": {
        "apart(name) for": "[(0.0, 0.0)] * 4 for",
    },
    "benchmarks/inner_loop.py": {
        "ROUNDS = 7": "ROUNDS = 1",
        "else (8, 1)": "else (2, 1)",
        "for name in MEMORY:": "for name in ():",
    },
    "benchmarks/unrolls.py": {
        "ROUNDS, TOLERANCE = 7, 1e-9": "ROUNDS, TOLERANCE = 1, 1e-6",
        "LENGTHS = 100, 20, (5, 10, 20, 50, 100)": "LENGTHS = 4, 2, (2, 4)",
        "(1, 2, 5, 10, 20, 50, 100), (40, 200), 20": "(2, 4), (1, 2), 2",
        "mib = [peak_apart(*case) for case in": 'mib = ["0" for case in',
    },
}


def cells(name: str) -> list[str]:
    """The code of a chapter, without what only Jupyter understands, or of a benchmark."""
    if name in BENCHMARKS:
        return [(ROOT / name).read_text(encoding="utf-8")]
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    found = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return [text for text in found if "%pip" not in text]


def smaller(name: str, code: list[str]) -> list[str]:
    """The same at SMALL sizes.

    Raises:
        ValueError: if something of SMALL is not in the chapter any more.
    """
    for old, new in SMALL.get(name, {}).items():
        if not any(old in text for text in code):
            raise ValueError(f"tools/ondevice.py: {name} holds no {old!r} that could be cut.")
        code = [text.replace(old, new) for text in code]
    return code


class _OnDevice(ast.NodeTransformer):
    """Puts a chapter on another device; results need not be as asserted."""

    def __init__(self, device: str) -> None:
        self.device = device

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """`"cuda" if torch.cuda.is_available() else "cpu"` becomes the device."""
        self.generic_visit(node)
        chosen = isinstance(node.body, ast.Constant) and node.body.value == "cuda"
        return ast.copy_location(ast.Constant(self.device), node) if chosen else node

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        self.generic_visit(node)
        return ast.copy_location(ast.Expr(node.test), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """`torch.testing.assert_close(a, b, ...)` becomes `(a, b)`."""
        self.generic_visit(node)
        close = isinstance(node.func, ast.Attribute) and node.func.attr == "assert_close"
        return ast.copy_location(ast.Tuple(node.args, ast.Load()), node) if close else node


def run(name: str, device: str | None = None) -> None:
    """Run a chapter or a benchmark: whole where it likes, or small on a device.

    Raises:
        ValueError: if something of SMALL is not in the code any more.
    """
    code = cells(name) if device is None else smaller(name, cells(name))
    names = {"__name__": "__main__", "__file__": str(ROOT / name), "display": lambda *_: None}
    for k, text in enumerate(code):
        tree = ast.parse(text)
        if device is not None:
            tree = ast.fix_missing_locations(_OnDevice(device).visit(tree))
        with mock.patch.object(sys, "argv", [name]):
            exec(compile(tree, f"{name}, code cell {k}", "exec"), names)
        plt.close("all")
