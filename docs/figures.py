"""Figures and numbers of docs/mathematics.md: python docs/figures.py

Draws docs/figures/*.svg and writes the tables of the text between their marks; all else of the text is prose. The
errors of `eigh` are those of tests/golden/stu_filters.npz, which has the exact eigenpairs to compare with.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stu.ops.filters import spectral_filters
from stu.ops.realization import realize_filters
from stu.ops.slepian import default_bandwidth, slepian_filters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
TEXT = HERE / "mathematics.md"
GOLDEN = HERE.parent / "tests" / "golden" / "stu_filters.npz"
K = 24  # filters, as in conf/model/stu.yaml
LENGTHS = (64, 256, 1024, 4096, 16384)
GAPS = np.geomspace(1e-6, 1, 73)  # 1 − α
GREY = "#808489"  # of all text and axes: legible on white and on black
COLOURS = ("#2f7fd6", "#e0782f", "#2fa37c", "#c2529b", "#8a7be0")


@cache
def filters(seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (K,) and filters (L, K)."""
    eigenvalues, vectors = spectral_filters(seq_len, K)
    return eigenvalues.numpy(), vectors.numpy()


def least_errors(seq_len: int, counts: Sequence[int], lags: int = 0) -> np.ndarray:
    """The least ‖α^i − Σ_k c_k φ_k(i)‖ / ‖α^i‖ of every gap and number of filters, (counts, gaps).

    lags: of the STU: as many first steps are free, and the filters lag by one step less.
    """
    time = np.arange(seq_len)[:, None]
    responses = np.exp(time * np.log1p(-GAPS[:-1]))  # (L, gaps) but for α = 0
    responses = np.hstack((responses, time == 0))
    delayed = np.roll(filters(seq_len)[1], max(lags - 1, 0), 0)
    delayed[: max(lags - 1, 0)] = 0
    errors = []
    for count in counts:
        basis, _ = np.linalg.qr(np.hstack((np.eye(seq_len, lags), delayed[:, :count])))
        rest = responses - basis @ (basis.T @ responses)
        errors.append(np.linalg.norm(rest, axis=0) / np.linalg.norm(responses, axis=0))
    return np.array(errors)


def loss_of_a_pole(target: float, seq_len: int) -> np.ndarray:
    """‖α^i − α*^i‖² / ‖α*^i‖² of every gap."""
    time = np.arange(seq_len)[:, None]
    true = target**time
    return ((np.clip(1 - GAPS, 0, None) ** time - true) ** 2).sum(0) / (true**2).sum()


def exactness(seq_len: int) -> dict[str, np.ndarray]:
    """Relative errors of σ_k and errors of φ_k, largest eigenvalue first: ours, and those of a dense float64 `eigh`."""
    with np.load(GOLDEN) as file:
        start = f"hp__std_L{seq_len}_K{K}__"
        exact = {key.removeprefix(start): file[key][..., ::-1] for key in file.files if key.startswith(start)}
    eigenvalues, vectors = filters(seq_len)
    return {
        "eigh, values": exact["f64_relerr_val"],
        "eigh, vectors": exact["f64_err_vec"],
        "ours, values": np.abs(eigenvalues / exact["eig_vals"] - 1),
        "ours, vectors": np.linalg.norm(vectors - exact["eig_vecs"], axis=0),
    }


def decay() -> str:
    """σ_k / σ_1."""
    values = [filters(length)[0] for length in LENGTHS]
    rows = [[k, *(shown(each[k - 1] / each[0]) for each in values)] for k in (2, 4, 8, 12, 16, 20, 24)]
    return table(["k", *(f"L = {length:,}" for length in LENGTHS)], rows)


def least() -> str:
    """The largest error over all gaps, without and with three lags."""
    counts, cases = (4, 8, 12, 16, 20, 24), [(length, lags) for length in (256, 1024) for lags in (0, 3)]
    columns = [map(shown, least_errors(length, counts, lags).max(1)) for length, lags in cases]
    head = ["K", *(f"L = {length:,}{', three lags' if lags else ''}" for length, lags in cases)]
    return table(head, zip(counts, *columns, strict=True))


def digits() -> str:
    """Errors of the dense `eigh`, and the largest of ours."""
    found = [exactness(length) for length in (64, 256, 1024)]

    def row(k: int) -> Iterator[object]:
        yield k + 1
        yield from (f"{shown(each['eigh, values'][k])} / {shown(each['eigh, vectors'][k])}" for each in found)
        yield " / ".join(shown(max(each[f"ours, {what}"][k] for each in found)) for what in ("values", "vectors"))

    head = ["k", *(f"`eigh`, L = {length:,}" for length in (64, 256, 1024)), "ours, the largest of the three"]
    return table(head, map(row, (0, 7, 15, 19, 23)))


def states() -> str:
    """Errors of the filters as sums of N exponentials."""
    counts = (16, 24, 32, 40, 48, 56)
    rows = [[f"L = {length:,}", *(shown(realized(length, count)) for count in counts)] for length in (1024, 16384)]
    return table(["N", *map(str, counts)], rows)


TABLES = {each.__name__: each for each in (decay, least, digits, states)}


def shown(value: float) -> str:
    """A number in few letters."""
    if value == 0 or 0.01 <= value < 100:
        return f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def realized(seq_len: int, count: int) -> float:
    """The largest relative error of a filter as a sum of that many exponentials."""
    return float(realize_filters(seq_len, K, num_states=count).error.max())


def table(head: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---:"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def updated(text: str) -> str:
    """The text with the tables of now."""
    for name, content in TABLES.items():
        start, end = marks(name)
        before, _, after = text.partition(start)
        text = f"{before}{start}\n{content()}\n{end}{after.partition(end)[2]}"
    return text


def marks(name: str) -> tuple[str, str]:
    """The lines between which a table stands."""
    return f"<!-- {name}: python docs/figures.py -->\n", f"<!-- end of {name} -->\n"


def draw() -> Iterator[str]:
    """Draw every figure, and say which."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
            **{"grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True, "axes.axisbelow": True, "font.size": 9},
            **{"axes.prop_cycle": mpl.cycler(color=COLOURS), "legend.frameon": False, "lines.linewidth": 1.5},
            **{"axes.spines.top": False, "axes.spines.right": False, "savefig.transparent": True},
            **{"svg.fonttype": "none", "svg.hashsalt": "stu", "font.family": "sans-serif"},
        }
    )
    import matplotlib.pyplot as plt

    for drawing in (memory, eigenvalues, shapes, few, exact, streaming, slepian):
        panels = [plt.subplots(figsize=(3.7, 2.9), layout="constrained") for _ in range(2)]
        drawing(*(axes for _, axes in panels))
        for number, (figure, axes) in enumerate(panels, 1):
            axes.minorticks_off()
            file = StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            plt.close(figure)
            name = f"{drawing.__name__}{number}.svg"
            (HERE / "figures" / name).write_text(short(file.getvalue()), encoding="utf-8")
            yield name


def short(svg: str) -> str:
    """The drawing with coordinates of two digits after the point."""
    rounded = re.sub(r"\d+\.\d{3,}(?=[\s\",)])", lambda number: f"{float(number[0]):.2f}", svg)
    return re.sub(r" +$", "", rounded, flags=re.MULTILINE)


def memory(left: "Axes", right: "Axes") -> None:
    """Impulse responses of one mode, and the loss as a function of its eigenvalue."""
    time = np.unique(np.geomspace(1, 1e5, 200).round())
    for gap in (1e-1, 1e-2, 1e-3, 1e-4):
        left.semilogx(time, (1 - gap) ** time, label=f"δ = {gap:g}")
    left.set(xlabel="steps i", ylabel="α^i", title="What a mode α = 1 − δ remembers", ylim=(-0.05, 1.5))
    left.legend(loc="upper center", ncols=2)
    for target in (1e-1, 1e-2, 1e-3):
        right.semilogx(GAPS, loss_of_a_pole(1 - target, 4096), label=f"δ* = {target:g}")
    right.set(
        xlabel="δ of the model", ylabel="relative squared error", title="Error of one learned eigenvalue", ylim=(0, 3)
    )
    right.legend(loc="upper left")


def eigenvalues(left: "Axes", right: "Axes") -> None:
    """The Hankel matrix, and its eigenvalues."""
    index = np.arange(1, 65)
    s = index[:, None] + index
    image = left.imshow(np.log10(2 / (s**3 - s)), cmap="viridis", extent=(0.5, 64.5, 64.5, 0.5))
    left.figure.colorbar(image, ax=left, label="log10 Z_ij")
    left.grid(visible=False)
    left.set(xlabel="j", ylabel="i", title="The matrix Z, L = 64")
    for length in LENGTHS:
        values, _ = filters(length)
        right.semilogy(np.arange(1, K + 1), values / values[0], ".-", label=f"L = {length:,}")
    right.set(xlabel="k", ylabel="σ_k / σ_1", title="Its eigenvalues")
    right.legend()


def shapes(left: "Axes", right: "Axes") -> None:
    """The first filters, and later ones, over the logarithm of time."""
    _, vectors = filters(1024)
    for axes, which in ((left, (1, 2, 3, 4)), (right, (8, 16, 24))):
        for k in which:
            axes.semilogx(np.arange(1, 1025), vectors[:, k - 1], label=f"k = {k}")
        axes.set(xlabel="step i + 1", ylabel="φ_k(i)")
        axes.legend()
    left.set_title("The first filters, L = 1024")
    right.set_title("Later ones")


def few(left: "Axes", right: "Axes") -> None:
    """The least error of an exponential by K filters, over its decay rate, without and with three lags."""
    counts = (4, 8, 16, 24)
    for axes, lags, title in ((left, 0, "K filters alone"), (right, 3, "K filters and three input lags")):
        for count, errors in zip(counts, least_errors(1024, counts, lags), strict=True):
            axes.loglog(GAPS, np.maximum(errors, 1e-12), label=f"K = {count}")
        axes.set(xlabel="δ = 1 − α", ylabel="least relative error of α^i", title=title, ylim=(1e-10, 2))
        axes.legend(loc="lower left", ncols=2)


def exact(left: "Axes", right: "Axes") -> None:
    """Errors of eigenvalues and filters against exact arithmetic."""
    for axes, what, name in ((left, "values", "relative error of σ_k"), (right, "vectors", "error of φ_k (2-norm)")):
        for colour, length in zip(COLOURS, (64, 256, 1024), strict=False):
            found = exactness(length)
            for whose, style in (("eigh", "-"), ("ours", ":")):
                errors = np.maximum(found[f"{whose}, {what}"], 1e-17)
                axes.semilogy(np.arange(1, K + 1), errors, style, color=colour, label=f"{whose}, L = {length}")
        axes.set(xlabel="k", ylabel=name)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    left.set_title("Errors of eigenvalues")
    right.set_title("Errors of filters")


def streaming(left: "Axes", right: "Axes") -> None:
    """The error of filters as sums of exponentials, and where the poles are."""
    counts = range(16, 65, 8)
    for length in (256, 1024, 4096, 16384):
        left.semilogy(counts, [realized(length, count) for count in counts], ".-", label=f"L = {length:,}")
    left.set(xlabel="states N", ylabel="largest relative error", title=f"{K} filters as N exponentials")
    left.legend()
    found = realize_filters(1024, K, num_states=48)
    right.loglog(1 - found.poles, found.coefficients.abs().max(1).values, "o", markersize=3)
    right.set(xlabel="1 − p_n", ylabel="largest coefficient", title="The 48 poles for L = 1024")


def slepian(left: "Axes", right: "Axes") -> None:
    """Slepian filters, and the least errors of waves by them and by those of the Hankel matrix, over the frequency."""
    time, seq_len = np.arange(1024)[:, None], 1024
    width = default_bandwidth(seq_len, K)
    _, vectors = slepian_filters(seq_len, K)
    for k in (1, 2, 3, 24):
        left.plot(time, vectors[:, k - 1], label=f"k = {k}")
    left.set(xlabel="step i", ylabel="φ_k(i)", title=f"Slepian filters, L = {seq_len}", ylim=(-0.15, 0.15))
    left.legend(ncols=2, fontsize=7)
    frequency = np.geomspace(width / 30, 20 * width, 97)
    waves = np.exp(2j * np.pi * frequency * time)
    for found, name in ((vectors, "Slepian"), (filters(seq_len)[1], "Hankel")):
        basis, _ = np.linalg.qr(found)
        errors = np.linalg.norm(waves - basis @ (basis.T @ waves), axis=0) / seq_len**0.5
        right.loglog(frequency, np.maximum(errors, 1e-10), label=name)
    right.axvline(width, color=GREY, linewidth=1)
    right.set(xlabel="frequency, cycles per step", ylabel="least relative error", title=f"Waves, by {K} filters")
    right.legend(loc="lower right")


if __name__ == "__main__":
    (HERE / "figures").mkdir(exist_ok=True)
    for drawn in draw():
        print(f"docs/figures/{drawn}")
    TEXT.write_text(updated(TEXT.read_text(encoding="utf-8")), encoding="utf-8")
    print("docs/mathematics.md: its tables are up to date")
