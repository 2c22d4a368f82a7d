"""Methods of the package at the scale of their papers: train, test, and test elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metautils import methods, runs
from metautils.files import read_json, write_json
from metautils.runs import RECORD
from records import RUNS, Experiment

TINY = {"steps": 2, "ways": 2, "tasks": 1, "queries": 1, "episodes": 2}


def trained(
    out: Path, device: torch.device, *, method: str, source: str, seed: int, preset: dict[str, Any]
) -> dict[str, Any]:
    """A method with these numbers in place of its preset's."""
    return runs.train(
        method, source, out, preset="full", seed=seed, device=device,
        validation_episodes=min(100, preset["episodes"]), **preset,
    )  # fmt: skip


def seeds(
    out: Path, device: torch.device, *, method: str, source: str, seeds: list[int],
    preset: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The same training several times: the seed draws the split, the weights and the episodes."""
    found = [
        trained(out / str(s), device, method=method, source=source, seed=s, preset=preset)
        for s in seeds
    ]
    rows = []
    for k, first in enumerate(found[0]["evaluations"]):
        each = torch.tensor([record["evaluations"][k]["accuracy"] for record in found]).double()
        widest = max(record["evaluations"][k]["ci95"] for record in found)
        rows.append([
            f"{first['ways']}-way {first['shots']}-shot", *(f"{x:.2f}" for x in each.tolist()),
            f"{each.mean():.2f}", f"{each.std():.2f}", f"{widest:.2f}",
        ])  # fmt: skip
    heads = ["Test", *(f"Seed {s}" for s in seeds), "Mean", "Standard deviation over seeds",
             "Interval of one seed's test, ±"]  # fmt: skip
    title = f"`train {method} --data {source} --preset full --seed ...`, accuracy in percent"
    record = {
        "what": f"{methods.known()[method].title} on {source}, trained with several seeds",
        "tables": [{"title": title, "heads": heads, "rows": rows}],
    }
    write_json(record, out / RECORD)  # so that who reads these runs knows that they are finished
    return record


def tested(out: Path, device: torch.device, *, run: str, **how: Any) -> dict[str, Any]:
    """Another test of a training."""
    path = runs.evaluate_again(RUNS / run, device=device, **how)
    return read_json(path)


def _trained(method: str, source: str, minutes: float, **changed: int) -> Experiment:
    """The full preset, but for the numbers that are changed."""
    preset = asdict(methods.known()[method].presets["full"]) | changed
    settings = {"method": method, "source": source, "seed": 0, "preset": preset}
    return Experiment(trained, settings, minutes, {"source": "glyphs", "preset": preset | TINY})


def _seeds(method: str, source: str, minutes: float, few: list[int]) -> Experiment:
    preset = asdict(methods.known()[method].presets["full"])
    settings = {"method": method, "source": source, "seeds": few, "preset": preset}
    tiny = {"source": "glyphs", "seeds": [0, 1], "preset": preset | TINY}
    return Experiment(seeds, settings, minutes, tiny)


def _tested(
    run: str, minutes: float = 1, tiny: dict[str, Any] | None = None, **how: Any
) -> Experiment:
    return Experiment(tested, {"run": run, **how}, minutes, tiny or {}, after=(run,))


EXPERIMENTS = {
    "protonet_glyphs": _trained("protonet", "glyphs", 10),
    "protonet_omniglot": _trained("protonet", "omniglot", 7),
    "protonet_seeds_omniglot": _seeds("protonet", "omniglot", 20, [0, 1, 2]),
    "matching_omniglot": _trained("matching", "omniglot", 25),
    "relation_omniglot": _trained("relation", "omniglot", 60),
    "relation_omniglot_5_shot": _trained("relation", "omniglot", 60, shots=5, steps=10000),
    "snail_omniglot_5w1s": _trained("snail", "omniglot", 60),
    "snail_omniglot_20w1s": _trained(
        "snail", "omniglot", 60, ways=20, queries=2, tasks=4, steps=12000
    ),
    "maml_omniglot": _trained("maml", "omniglot", 60),
    "meta_lstm_omniglot_5w1s": _trained("meta_lstm", "omniglot", 55),
    "meta_lstm_omniglot_5w5s": _trained("meta_lstm", "omniglot", 110, shots=5),
    "resnet50_cifar_fs": _trained("resnet50", "cifar_fs", 85),
    "protonet_glyphs_on_omniglot": _tested(
        "protonet_glyphs", tiny={"source": "glyphs"}, source="omniglot", split="background"
    ),
    "protonet_omniglot_rotated_per_episode": _tested("protonet_omniglot", rotations="episode"),
    "maml_omniglot_inductive": _tested("maml_omniglot", rotations="episode", transductive=False),
}
