import matplotlib.figure
import pytest
from matplotlib.colors import to_hex

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.transfer_picture import LOOKS, draw
from peft_fps.benchmarks.transfer.transfer_tables import Results
from tests.benchmarks.transfer.records import SETTING, chosen, record


def rows(method, tests=(0.4, 0.6, 0.8), **changes):
    """A complete row: a method on tasks a, b and c with one seed."""
    if method == "linear":
        return [
            record(method, task, test=test, share=None, rate=None) for task, test in zip("abc", tests, strict=True)
        ]
    by_task = zip("abc", tests, strict=True)
    return [trial for task, test in by_task for trial in chosen(method, task, test, **changes)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw the records; returns both panels."""
    canvases = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda canvas, path: (canvases.append(canvas), save(canvas, path))
    )

    def draw_records(*records):
        path = tmp_path / "transfer.png"
        draw(Results(records, SETTING), path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert len(path.read_bytes()) > 5_000
        return canvases[-1].axes

    return draw_records


def points(axes):
    """Position of a method's first point by its label."""
    return {bars.get_label(): tuple(bars.lines[0].get_xydata()[0]) for bars in axes.containers}


def test_looks_of_different_methods_differ():
    assert set(LOOKS) <= set(ARMS)
    assert len({(to_hex(color), marker) for color, marker in LOOKS.values()}) == len(LOOKS)
    assert len({marker for _, marker in LOOKS.values()}) == len(LOOKS)


def test_every_method_stands_where_it_belongs(drawn):
    left, right = drawn(*(r for method in LOOKS for r in rows(method)), *(record("fps-l2", task) for task in "abc"))
    assert left.get_xscale() == "log"
    labels = {ARMS[method].label for method in LOOKS}
    linear = ARMS["linear"].label
    assert set(points(left)) == labels - {linear}
    assert all(found == (pytest.approx(5.0), pytest.approx(60.0)) for found in points(left).values())
    assert [text.get_text() for text in left.get_legend().get_texts()][0] == linear
    without = {ARMS[method].label for method in ("full", "bitfit", "lora", "shira")}
    assert set(points(right)) == labels - {linear} - without
    assert all(found == (pytest.approx(1.0), pytest.approx(60.0)) for found in points(right).values())


def test_one_row(drawn):
    left, right = drawn(*rows("fps", trained=7, bytes={"select": 3 * 2**20, "train": 0, "adapter": 0}))
    assert points(left) == {"FPS": (pytest.approx(0.7), pytest.approx(60.0))}
    assert points(right) == {"FPS": (pytest.approx(3.0), pytest.approx(60.0))}


def test_bars_are_standard_errors_over_seeds(drawn):
    left, _ = drawn(*rows("fps"), *(record("fps", task, 1, test=0.5) for task in "abc"))
    bars = left.containers[0].lines[2][0].get_segments()[0]
    assert bars[:, 1].tolist() == [pytest.approx(50.0), pytest.approx(60.0)]  # 55 ± half the difference


def test_a_method_of_two_shares_is_a_line_in_order_and_its_memory_is_at_the_tuned_share(drawn):
    other = [
        record("fps", task, share=0.01, test=0.3, trained=10, bytes={"select": 2**30, "train": 0, "adapter": 0})
        for task in "abc"
    ]
    left, right = drawn(*rows("fps"), *other)
    for axes in (left, right):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["FPS"]
        assert len(axes.containers) == 1
    line = left.containers[0].lines[0]
    assert line.get_xydata().ravel().tolist() == pytest.approx([1.0, 30.0, 5.0, 60.0])
    assert line.get_linestyle() == "-"
    assert right.containers[0].lines[0].get_xydata().ravel().tolist() == pytest.approx([1.0, 60.0])


@pytest.mark.parametrize(
    "records",
    [[*chosen("fps"), record("gps", "b")], [*chosen("fps"), *chosen("fps", "b"), record("gps", "c")], []],
    ids=["one task of two", "two tasks of three", "nothing has been run"],
)
def test_nothing_is_complete(drawn, records):
    left, right = drawn(*records)
    assert not left.containers
    assert not right.containers
    assert left.get_legend() is None
