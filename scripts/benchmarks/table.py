"""Measurements as plain text."""

from collections.abc import Sequence


def table(result: dict) -> str:
    """Cases, ratios and memory of what `scripts.benchmarks.run.benchmark` gives, in lines."""
    device, settings, peak = result["device"], result["settings"], result["peak"]
    lines = [
        f"{device['name']}, {device['threads']} threads of {device['cores']} cores, torch {device['torch']}",
        f"{settings['size']}, latents {settings['latent']} × {settings['latent']}, batch {settings['batch']}, "
        f"{settings['precision']}{', compiled' if settings['compile'] else ''}, computed in {device['dtype']}",
    ]
    if peak is not None:
        lines.append(f"peak {peak['flops_per_s'] / 1e9:,.0f} GFLOP/s: {peak['how']}")
    if result["times"]:
        head = ("case", "median", "quartiles", "fastest", "n", "GFLOP", "utilisation")
        rows = [
            (
                *(name, _seconds(time["median_s"]), f"{_seconds(time['q1_s'])} to {_seconds(time['q3_s'])}"),
                *(_seconds(time["min_s"]), str(time["n"])),
                *(f"{result['flops'][name] / 1e9:,.1f}", f"{result['utilisation'][name]:.0%}"),
            )
            for name, time in result["times"].items()
        ]
        lines += ["", *columns([head, *rows])]
    if result["ratios"]:
        head = ("ratio of times", "medians", "quartiles of rounds", "n", "of FLOPs")
        rows = [
            (name, f"{r['value']:.3f}", f"{r['q1']:.3f} to {r['q3']:.3f}", str(r["n"]), f"{r['flops']:.3f}")
            for name, r in result["ratios"].items()
        ]
        lines += ["", *columns([head, *rows])]
    if result["absolute"]:
        lines += ["", *columns([(name, _seconds(value)) for name, value in result["absolute"].items()])]
    if result["compile"]:
        head = ("compiled", "graphs", "graph breaks", "while timed")
        rows = [
            (name, *(str(entry[key]) for key in ("graphs", "graph_breaks", "graphs_compiled_while_timed")))
            for name, entry in result["compile"].items()
        ]
        lines += ["", *columns([head, *rows])]
    if result["memory"]["peaks"]:
        rows = [
            (name, _mebibytes(peak["above_loaded_bytes"]), _mebibytes(peak["loaded_bytes"]))
            for name, peak in result["memory"]["peaks"].items()
        ]
        lines += ["", *columns([("memory", "peak above loaded", "loaded"), *rows]), result["memory"]["how"]]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells of equal width, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.1f} MiB"
