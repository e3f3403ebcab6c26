"""What `bench.real_networks` measured: a file of lines, and a page of tables beside its targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from limpq_ext.scores import ranks
from limpq_ext.values.indicators import Indicators

from .report import markdown

DEFAULT: Final = "loss_aware"
"""The score whose policies the targets are of."""

AGREEMENT: Final = {6: 0.85, 5: 0.68, 4: 0.50, 3: 0.22}
"""Of EfficientNet-Lite0, by the bits of the budget: the least share of equal classes."""
OF_UNIFORM: Final = 0.55
"""The most of uniform's divergence that the policy has there."""
CORRELATION: Final = 0.7
LOSS_AWARE: Final = 1.05
"""The most of the best score's divergence that loss-aware indicators have."""

NO_SCORES: Final = ("uniform", "learned", "learned, normalised")
"""Ways that are not among the best scores which are fine-tuned."""


class NotThereYet(Exception):  # noqa: N818  # no error: a task's turn has not come
    """A result needs another one."""


class Results:
    """Results by key, in a file of one JSON object a line.

    Args:
        path: The file; it need not exist. A last line that was not written in full does not count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[tuple[str, ...], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self._found[tuple(entry["key"])] = entry["result"]

    def has(self, key: tuple[str, ...]) -> bool:
        """Whether there is a result."""
        return key in self._found

    def add(self, key: tuple[str, ...], result: dict[str, Any]) -> None:
        """Keep a result, in the file at once."""
        self._found[key] = result
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps({"key": key, "result": result}) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All of them, in the order of the file."""
        return [{"key": key, "result": result} for key, result in self._found.items()]

    def of(
        self, network: str, what: str, budget: str = "", seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """Results of one kind, by score."""
        return {
            key[2]: result
            for key, result in self._found.items()
            if (key[0], key[1], key[3], key[4]) == (network, what, budget, str(seed))
        }

    def networks(self) -> list[str]:
        """The networks that have results."""
        return list(dict.fromkeys(key[0] for key in self._found))

    def commits(self) -> list[str]:
        """Those at which they were measured."""
        found = (result.get("commit") for result in self._found.values())
        return list(dict.fromkeys(commit for commit in found if commit))

    def budgets(self, network: str, what: str) -> list[str]:
        """The budgets that have results of a kind."""
        return list(dict.fromkeys(k[3] for k in self._found if k[:2] == (network, what)))

    def seconds(self, network: str, what: str) -> float | None:
        """The median time that a result of a kind took a core; None where there is none."""
        found = [r["cpu_seconds"] for k, r in self._found.items() if k[:2] == (network, what)]
        return statistics.median(found) if found else None

    def best_scores(self, network: str, budget: str) -> list[str]:
        """Scores by the divergence of their policies on images that nothing else saw, least first.

        Raises:
            NotThereYet: There are fewer than two.
        """
        found = self.of(network, "calibrated", budget)
        scores = [
            way
            for way in found
            if way not in NO_SCORES and way.split()[0] not in ("random", "negated", "refined")
        ]
        if len(scores) < 2:
            raise NotThereYet(f"{network} has policies of {len(scores)} scores at {budget}")
        return sorted(scores, key=lambda way: found[way]["choice_kl"])


# --- numbers ------------------------------------------------------------------------------------


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Spearman's rank correlation and the ends of its interval of 95 %, by bootstrap.

    Returns:
        None of fewer than 5 pairs, or where all values are equal.
    """
    value = ranks.rank_correlation(x, y) if len(x) >= 5 else None
    if value is None:
        return None
    low, high = ranks.interval(x, y, np.random.default_rng(0)) or (value, value)
    return value, low, high


def predicted(scores: Indicators, layers: Sequence[str], result: Mapping[str, Any]) -> float:
    """The sum of a policy's scores.

    Args:
        scores: Of the layers that are searched.
        layers: Names of the policy's layers; those without scores do not count.
        result: With the policy's ``weight_bits`` and ``activation_bits``.
    """
    own = {layer.name: layer for layer in scores.layers}
    bits = zip(layers, result["weight_bits"], result["activation_bits"], strict=True)
    return sum(
        own[name].weight[weight] + own[name].activation[activation]
        for name, weight, activation in bits
        if name in own
    )


def correlation(
    results: Results, scores: Indicators, network: str, budget: str
) -> tuple[float, float, float] | None:
    """How a score ranks the random policies of a budget by their divergence."""
    layers = results.of(network, "float")["float"]["layers"]
    found = _random(results.of(network, "calibrated", budget))
    return rank_correlation(
        [predicted(scores, layers, result) for result in found], [r["kl"] for r in found]
    )


def _random(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [result for way, result in found.items() if way.startswith("random ")]


Row = tuple[str, str, str, bool]
"""What is wanted, how much, what was measured, and whether that is enough."""


def targets(results: Results, scores: Mapping[str, Mapping[str, Indicators]]) -> list[Row]:
    """The targets of which everything was measured.

    Args:
        results: What was measured.
        scores: Network -> score -> its indicators.
    """
    rows: list[Row] = []
    for network in results.networks():
        for budget in results.budgets(network, "calibrated"):
            rows += _calibrated_targets(results, scores.get(network, {}), network, budget)
        for budget in results.budgets(network, "tuned"):
            rows += _tuned_targets(results, network, budget)
    return rows


def _calibrated_targets(
    results: Results, scores: Mapping[str, Indicators], network: str, budget: str
) -> Iterable[Row]:
    found = results.of(network, "calibrated", budget)
    where = f"{network}, {budget}"
    if DEFAULT not in found:
        return
    kl = found[DEFAULT]["kl"]
    if "uniform" in found:
        most = OF_UNIFORM if network == "lite0" and budget.startswith("BitOps") else 1.0
        ratio = kl / found["uniform"]["kl"]
        yield f"{where}: KL over uniform's", f"<= {most}", f"{ratio:.2f}", ratio <= most
    drawn = _random(found)
    if drawn:
        better = sum(result["kl"] <= kl for result in drawn)
        told = f"{better} of {len(drawn)}"
        yield f"{where}: random policies that are as good", "0", told, better == 0
    if network == "lite0" and budget.startswith("BitOps"):
        least = AGREEMENT[int(budget.split()[2])]
        share = found[DEFAULT]["agreement"]
        yield f"{where}: equal classes", f">= {least:.0%}", f"{share:.1%}", share >= least
    if f"refined {DEFAULT}" in found:
        ratio = found[f"refined {DEFAULT}"]["kl"] / kl
        yield f"{where}: KL refined over the score's", "< 1", f"{ratio:.2f}", ratio < 1
    others = [r["kl"] for way, r in found.items() if way in scores and way not in NO_SCORES]
    if "loss_aware" in found and len(others) > 1:
        ratio = found["loss_aware"]["kl"] / min(others)
        wanted = f"<= {LOSS_AWARE}"
        told = f"{ratio:.2f}"
        yield f"{where}: loss_aware's KL over the best score's", wanted, told, ratio <= LOSS_AWARE
    if DEFAULT in scores:
        r = correlation(results, scores[DEFAULT], network, budget)
        if r is not None:
            yield (
                f"{where}: rank correlation over random policies",
                f">= {CORRELATION}",
                _interval(r),
                r[0] >= CORRELATION,
            )


def _tuned_targets(results: Results, network: str, budget: str) -> Iterable[Row]:
    ours, uniform = (tuned(results, network, budget, way) for way in ("best", "uniform"))
    if len(ours) < 2 or len(uniform) < 2:
        return
    gain = statistics.mean(ours) - statistics.mean(uniform)
    deviation = max(statistics.stdev(ours), statistics.stdev(uniform))
    told = f"{100 * gain:+.1f} points, deviation {100 * deviation:.1f}"
    where = f"{network}, {budget}, fine-tuned: the best score's over uniform"
    yield where, "> 2 deviations", told, gain > 2 * deviation


def tuned(results: Results, network: str, budget: str, way: str) -> list[float]:
    """The shares of equal classes after fine-tuning, one for each seed."""
    found = []
    seed = 0
    while way in (own := results.of(network, "tuned", budget, seed)):
        found.append(own[way]["agreement"])
        seed += 1
    return found


# --- the page -----------------------------------------------------------------------------------


def page(
    run: Mapping[str, Any],
    results: Results,
    scores: Mapping[str, Mapping[str, Indicators]],
) -> str:
    """All tables, as Markdown.

    Args:
        run: On what and how it was measured.
        results: What was measured.
        scores: Network -> score -> its indicators.
    """
    commits = results.commits() or [run["commit"] or "unknown"]
    commit = ", ".join(one[:12] for one in commits) + (" with changes" if run["dirty"] else "")
    lines = [
        "# Scores on networks whose layers differ",
        "",
        "`python -m bench.real_networks`; everything measured is in `real_networks.json`."
        f" {run['cpu']}, torch {run['versions']['torch']}, commit {commit}, {run['date']}."
        " A cell is the share of test images on which the quantized network has the float network's"
        " class, in per cent, and the mean KL(float || quantized) in nats. Weights have a scale per"
        f" channel, candidates are {', '.join(map(str, run['bits']))} bits, first and last layer"
        f" have 8. Calibrated on {run['calibration_images']} images: step sizes of least squared"
        " error, batch normalisation and biases corrected by what quantization moves. Scores are"
        f" measured on the same images, loss_aware on {run['loss_aware_images']}; policies are"
        f" refined on {run['refining_images']} others. Random policies use 99 to 100 % of the"
        " budget.",
        "",
        "## Targets",
        "",
        markdown(
            [
                ("what", "wanted", "measured", ""),
                *((*row[:3], "met" if row[3] else "missed") for row in targets(results, scores)),
            ]
        ),
    ]
    for network in results.networks():
        lines += ["", f"## {network}", "", *_of_network(results, scores.get(network, {}), network)]
    return "\n".join(lines) + "\n"


def _of_network(results: Results, scores: Mapping[str, Indicators], network: str) -> Iterable[str]:
    told = results.of(network, "float").get("float")
    if told is not None:
        accuracy = f", accuracy {told['accuracy']:.2%}" if "accuracy" in told else ""
        yield (
            f"Float: mean largest probability {told['mean_largest_probability']:.2f}{accuracy};"
            f" {len(told['layers'])} layers are quantized."
        )
        yield ""
    seconds = results.of(network, "score")
    budgets = results.budgets(network, "calibrated")
    if seconds and not budgets:
        yield "Processor seconds of each score on one thread, on a batch of 32 images:"
        yield ""
        yield markdown([tuple(seconds), tuple(f"{r['seconds']:.0f}" for r in seconds.values())])
        yield ""
    if budgets:
        yield "Calibrated, without training:"
        yield ""
        found = {budget: results.of(network, "calibrated", budget) for budget in budgets}
        ways = dict.fromkeys(
            way for own in found.values() for way in own if not way.startswith("random ")
        )
        rows = [("policy", "seconds of the score", *budgets)]
        for way in ways:
            time = f"{seconds[way]['seconds']:.0f}" if way in seconds else ""
            rows.append((way, time, *(_cell(found[budget].get(way)) for budget in budgets)))
        drawn = [_random(found[budget]) for budget in budgets]
        rows.append(("random, median", "", *map(_median, drawn)))
        best = [min(own, key=lambda r: r["kl"], default=None) for own in drawn]
        counted = [
            f"{_cell(b)} of {len(own)}" if own else "" for b, own in zip(best, drawn, strict=True)
        ]
        rows.append(("random, best", "", *counted))
        yield markdown(rows)
        yield ""
    if scores and told is not None and budgets:
        rows = [("score", *budgets)]
        for score, indicators in scores.items():
            cells = [correlation(results, indicators, network, budget) for budget in budgets]
            if any(cells):
                rows.append((score, *(_interval(cell) if cell else "" for cell in cells)))
        if len(rows) > 1:
            yield "Rank correlation of the sum of scores with the KL of random policies, 95 %:"
            yield ""
            yield markdown(rows)
            yield ""
    budgets = results.budgets(network, "start")
    if budgets:
        yield "Uniform policies by where step sizes begin and what becomes of statistics:"
        yield ""
        found = {budget: results.of(network, "start", budget) for budget in budgets}
        ways = dict.fromkeys(way for own in found.values() for way in own)
        rows = [("start", *budgets)]
        rows += [(way, *(_cell(found[budget].get(way)) for budget in budgets)) for way in ways]
        yield markdown(rows)
        yield ""
    budgets = results.budgets(network, "tuned")
    if budgets:
        yield "Fine-tuned with distillation, equal classes in per cent, mean and deviation:"
        yield ""
        ways = dict.fromkeys(
            way for budget in budgets for way in results.of(network, "tuned", budget)
        )
        rows = [("policy", *budgets)]
        for way in ways:
            rows.append((way, *(_shown(tuned(results, network, b, way)) for b in budgets)))
        yield markdown(rows)
        yield ""


def _cell(result: Mapping[str, Any] | None) -> str:
    return "" if result is None else f"{100 * result['agreement']:.1f}; {result['kl']:.3f}"


def _median(drawn: Sequence[Mapping[str, Any]]) -> str:
    if not drawn:
        return ""
    middle = {key: statistics.median(r[key] for r in drawn) for key in ("agreement", "kl")}
    return _cell(middle)


def _interval(r: tuple[float, float, float]) -> str:
    return f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})"


def _shown(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    deviation = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{deviation}"
