"""The report as one HTML page with nothing outside of it."""

import io
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib

from audit_report.checks import Audit, Distributions, Equality, Test

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .3em .7em; text-align: left }
.passed { color: #1a7f37 } .failed { color: #c62828; font-weight: bold } code { background: #f3f3f3 }
svg { max-width: 100%; height: auto }
"""
MOST_DIFFERENCES = 50


def page(audit: Audit) -> str:
    equalities, distributions = audit.equalities, audit.distributions
    body = [
        f"<h1>Lossless: {_verdict(audit.passed)}</h1>",
        _table([], audit.facts.items()),
        "<h2>Verdicts</h2>",
        _table(["check", "asked", "verdict"], [_verdict_row(name, check) for name, check in audit.checks.items()]),
        figure(audit),
    ]
    if equalities:
        header = ["check", "accept length", "tok/s with speculation", "tok/s without", "speed-up"]
        body += ["<h2>Acceptance and speed</h2>", _table(header, map(_speed_row, equalities))]
    body += [_differences(equality) for equality in equalities if equality.differences]
    if distributions:
        header = ["prompt", "of", "freedom", "p", "p adjusted", "distance", "expected", "differs most: with, without"]
        body += ["<h2>Two-sample tests</h2>", _table(header, map(_test_row, distributions.tests))]
    head = f"<meta charset='utf-8'><title>specbackend audit</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def figure(audit: Audit) -> str:
    """The plots there are data for, as SVG."""
    plots = [(plot, audit.distributions) for plot in (_plot_p, _plot_distance) if audit.distributions]
    plots += [(plot, audit.equalities) for plot in (_plot_accept, _plot_rates) if audit.equalities]
    drawn, axes = plt.subplots(len(plots) // 2, 2, figsize=(10, 1.7 * len(plots)), squeeze=False)
    for (plot, data), axis in zip(plots, axes.flat, strict=True):
        plot(axis, data)
    drawn.tight_layout()
    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    plt.close(drawn)
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the doctype, which names an address


def _plot_p(axis, distributions: Distributions) -> None:
    names = list(dict.fromkeys(test.what for test in distributions.tests))
    for prompt in range(distributions.prompts):
        tests = [test for test in distributions.tests if test.prompt == prompt]
        axis.plot([test.result.p for test in tests], "o", markersize=5, label=f"prompt {prompt}")
    axis.axhline(distributions.alpha / len(distributions.tests), color="tab:red", linewidth=1)
    axis.set(yscale="log", title="p of the two-sample tests; red: where Holm begins", ylabel="p")
    axis.set_xticks(range(len(names)), names, rotation=20, fontsize=7)
    axis.legend(fontsize=7)


def _plot_distance(axis, distributions: Distributions) -> None:
    tests = distributions.tests
    largest = max(*(test.result.distance for test in tests), *(test.result.noise for test in tests))
    axis.plot([0, largest], [0, largest], color="grey", linewidth=1)
    axis.plot([test.result.noise for test in tests], [test.result.distance for test in tests], "o", markersize=5)
    axis.set(title="total variation distance", xlabel="expected of equal distributions", ylabel="measured")


def _plot_accept(axis, equalities: Sequence[Equality]) -> None:
    for equality in equalities:
        axis.hist(equality.speculative.accept_lengths, bins=20, alpha=0.6, label=equality.name)
    axis.set(title="accept length per answer", xlabel="tokens per verification", ylabel="answers")
    axis.legend(fontsize=7)


def _plot_rates(axis, equalities: Sequence[Equality]) -> None:
    for offset, kind in ((-0.2, "speculative"), (0.2, "plain")):
        rates = [getattr(equality, kind).rate for equality in equalities]
        axis.bar([place + offset for place in range(len(rates))], rates, 0.4, label=kind)
    axis.set_xticks(range(len(equalities)), [equality.name for equality in equalities])
    axis.set(title="speed, all prompts at once", ylabel="tok/s")
    axis.legend(fontsize=7)


def _verdict_row(name: str, check: Equality | Distributions) -> tuple:
    if isinstance(check, Equality):
        return f"{name} tokens", f"{check.prompts} prompts, {check.plain.tokens} tokens", check.passed
    what = f"{name}: {len(check.tests)} two-sample tests, Holm's correction, error rate {check.alpha} in all"
    return what, f"{check.prompts} prompts, {check.draws} draws of each sample and prompt", check.passed


def _speed_row(equality: Equality) -> tuple:
    fast, plain = equality.speculative, equality.plain
    ratio = f"{fast.rate / plain.rate:.2f}x"
    return equality.name, f"{fast.accept_length:.2f}", f"{fast.rate:.1f}", f"{plain.rate:.1f}", ratio


def _differences(equality: Equality) -> str:
    return f"<h2>Where {equality.name} answers differ</h2>" + _table(
        ["prompt", "first at token", "ids before", "with speculation", "without"],
        [
            (d.prompt, d.position, *map(_ids, (d.before, d.speculative, d.plain)))
            for d in equality.differences[:MOST_DIFFERENCES]
        ],
    )


def _ids(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) or "(ended)"


def _test_row(test: Test) -> tuple:
    result = test.result
    suspect = result.suspects[0] if result.suspects else None
    most = f"{suspect.outcome}: {suspect.first:.4f}, {suspect.second:.4f}" if suspect else ""
    numbers = (f"{value:.4g}" for value in (result.p, test.adjusted_p, result.distance, result.noise))
    return test.prompt, test.what, result.freedom, *numbers, most


def _verdict(passed: bool) -> str:
    return f"<span class='{'passed' if passed else 'failed'}'>{'no difference' if passed else 'DIFFERENT'}</span>"


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    def cell(value: object) -> str:
        return _verdict(value) if isinstance(value, bool) else escape(str(value))

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"
