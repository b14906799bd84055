"""Score a checkpoint folder: is the background right, is each object, do open prompts vary and stay clean?"""

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zimage.vae import AutoencoderKL
from zimage.weights.recipe.export import load_folder
from zimage.weights.recipe.judge import Finding, find
from zimage.weights.recipe.prompts import Trial, free_trials, open_trials, scored_trials
from zimage.weights.recipe.sample import render
from zimage.weights.recipe.scenes import Scene, draw, random_pair, sheet, single_scenes

Render = Callable[[Sequence[str], Sequence[int]], list[Tensor]]


def score(folder: Path, dtype: torch.dtype, steps: int, report: Path | None, pictures: Path | None) -> dict:
    painter, vae, tokenizer = load_folder(folder, dtype)
    results = {"steps": steps, "guidance": 0.0, "dtype": str(dtype).removeprefix("torch.")}
    results["scorer's ceiling"] = ceiling(vae)
    trials = scored_trials() + free_trials() + open_trials()

    def renderer(prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        return render(painter, vae, tokenizer, prompts, seeds, steps)

    images = renderer([t.prompt for t in trials], [t.seed for t in trials])
    findings = [find(image, len(trial.objects)) for image, trial in zip(images, trials, strict=True)]
    results["groups"] = group_scores(trials, findings)
    results["freedom"] = freedom(trials, findings)
    print_table(results)
    print_failures(trials, findings)
    if pictures:
        sheet([image for image, t, f in zip(images, trials, findings, strict=True) if not right(t, f)]).save(pictures)
    line = json.dumps(results)
    if report:
        report.write_text(json.dumps(results, indent=2) + "\n")
    print(line)
    return results


def objects_right(trial: Trial, finding: Finding) -> list[bool]:
    return [found.name == wanted for found, wanted in zip(finding.objects, trial.objects, strict=True)]


def right(trial: Trial, finding: Finding) -> bool:
    """Everything the prompt asks for is there, and the picture is clean."""
    background = trial.background is None or finding.background == trial.background
    size = trial.size is None or finding.size == trial.size
    return finding.clean and background and size and all(objects_right(trial, finding))


def group_scores(trials: list[Trial], findings: list[Finding]) -> dict[str, dict]:
    groups = defaultdict(list)
    for trial, finding in zip(trials, findings, strict=True):
        groups[trial.group].append((trial, finding))
    return {name: shares(rows) for name, rows in groups.items()}


def shares(rows: list[tuple[Trial, Finding]]) -> dict[str, float]:
    def mean(values: list[bool]) -> float:
        return round(sum(values) / len(values), 4)

    grounds = [f.background is not None and t.background in (None, f.background) for t, f in rows]
    return {
        "n": len(rows),
        "background": mean(grounds),
        "object": mean([ok for t, f in rows for ok in objects_right(t, f)]),
        "size": mean([t.size in (None, f.size) for t, f in rows]),
        "gap": mean([f.gap for _, f in rows]),
        "clean": mean([f.clean for _, f in rows]),
        "all right": mean([right(t, f) for t, f in rows]),
    }


def freedom(trials: list[Trial], findings: list[Finding]) -> dict:
    """How open prompts use their freedom: do two seeds differ, and how often is each choice taken?"""
    by_prompt = defaultdict(list)
    chosen: dict[str, Counter[str]] = {"colour": Counter(), "single": Counter(), "pair": Counter()}
    for trial, finding in zip(trials, findings, strict=True):
        if not trial.group.startswith("open"):
            continue
        first = finding.objects[0]
        by_prompt[trial.prompt].append((finding.background, first.size, first.x, first.y))
        chosen["colour"][str(finding.background)] += 1
        if len(trial.objects) == 1:
            chosen["single"][f"{finding.size} at {first.x},{first.y}"] += 1
        else:
            chosen["pair"][f"{finding.size} at height {first.y}"] += 1
    pairs = [pair for views in by_prompt.values() for pair in itertools.combinations(views, 2)]
    counts = {name: dict(sorted(counter.items())) for name, counter in chosen.items()}
    return {"two seeds differ": round(sum(a != b for a, b in pairs) / len(pairs), 4), **counts}


@torch.no_grad()
def ceiling(vae: AutoencoderKL, count: int = 200) -> dict[str, float]:
    """What the scorer says of true scenes that went through the autoencoder."""
    rng, singles = random.Random(11), single_scenes()
    scenes: list[Scene] = [rng.choice(singles) if i % 2 else random_pair(rng) for i in range(count)]
    rows = []
    for scene in scenes:
        picture = vae.decode(vae.encode(draw(scene)[None]))[0]
        names = tuple(o.name for o in scene.objects)
        rows.append((Trial("", "", names, scene.background), find(picture, len(names))))
    return shares(rows)


def print_table(results: dict) -> None:
    columns = ("n", "background", "object", "size", "gap", "clean", "all right")
    print(f"{'':22}" + "".join(f"{column:>12}" for column in columns))
    for name, row in {"scorer's ceiling": results["scorer's ceiling"], **results["groups"]}.items():
        print(f"{name:22}" + "".join(f"{row[column]:>12}" for column in columns))
    print("freedom:", json.dumps(results["freedom"]))


def print_failures(trials: list[Trial], findings: list[Finding]) -> None:
    for t, f in zip(trials, findings, strict=True):
        if not right(t, f):
            found = " + ".join(o.name for o in f.objects)
            print(f"  wrong: {t.prompt!r} seed {t.seed}: {found} on {f.background}, error {f.error:.2f}, gap {f.gap}")
