"""The commands as a user runs them, on tiny tasks."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from peft_fps.benchmarks.transfer import campaign, worker_pool
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.campaign import CELLS, PICTURE, TABLES, chosen_tasks, table_rows
from peft_fps.benchmarks.transfer.cells import Cell
from peft_fps.benchmarks.transfer.store import Store, read
from peft_fps.cli.app import app
from tests.benchmarks.transfer.records import SETTING, SHARE, chosen, results
from tests.support.forked import forking


RATES = (0.003, 0.01, 0.03)
TITLE = re.compile(r"\*\*(.*)\*\*")


def run(name, *arguments):
    environment = {"COLUMNS": "300", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["benchmark", name, *map(str, arguments)], env=environment)


@pytest.fixture(scope="package")
def options(setting):
    return (
        *("--model", setting.model, "--tasks", setting.tasks, "--image-size", setting.image_size),
        *("--epochs", setting.epochs, "--batch-size", setting.batch_size, "--precision", setting.precision),
        *("--tuned-share", setting.tuned_share, "--budgets", SHARE),
    )


def tables_of(path):
    """The lines of each table, by title and then by the method that they begin with."""
    found, title = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        title = line.strip("*") if line.startswith("**") else title
        method, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        found.setdefault(title, {})[method] = numbers
    return found


def percent(value):
    return f"{100 * value:.1f}"


@pytest.fixture(scope="module", autouse=True)
def forked_cells():
    """Cells run in processes that are forked from one with the libraries, and not spawned, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "multiprocessing", SimpleNamespace(get_context=lambda start: forking()))
        yield


@pytest.fixture(scope="module")
def whole_run(options, tmp_path_factory):
    output = tmp_path_factory.mktemp("transfer") / "new"
    arguments = ("--methods", "magnitude-layer", "--seeds", 1, "--jobs", 2, "--baseline", "linear")
    return run("transfer", *options, *arguments, "--output", output), output


def test_a_run_ends_with_the_tables_and_writes_them(whole_run, setting):
    done, output = whole_run
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in output.iterdir()) == ["cells.jsonl", "transfer.md", "transfer.png"]
    assert (output / "transfer.png").read_bytes().startswith(b"\x89PNG")
    header, records = read(output / "cells.jsonl")
    assert header["setting"] == setting.comparable()
    assert {"torch", "peft", "peft-fps"} <= set(header["versions"])
    assert header["processor"]

    tried, last = records[:6], {record.cell: record for record in records[6:]}  # one round after the other
    assert {record.cell for record in tried} == {
        Cell(task, "magnitude", SHARE, 0, rate) for task in ("bright", "stripes") for rate in RATES
    }
    best = {}
    for task in ("bright", "stripes"):
        validation = {record.cell.learning_rate: record.validation for record in tried if record.cell.task == task}
        best[task] = min(rate for rate in RATES if validation[rate] == max(validation.values()))
    cells = [Cell(task, "magnitude-layer", SHARE, 0, rate) for task, rate in best.items()]
    assert set(last) == set(cells)

    lines = tables_of(output / "transfer.md")
    _, accuracies, _, rates, costs = lines.values()
    test = [last[cell].test for cell in cells]
    trained = f"{100 * last[cells[0]].trained / last[cells[0]].backbone:.2f}"
    means = [*map(percent, test * 2), percent(sum(test) / 2)]  # tasks, their groups, all
    assert accuracies["magnitude, layer"] == [trained, "1", *means]
    assert rates["magnitude, as NeuroAda"] == [f"{rate:g}" for rate in best.values()]
    assert "magnitude, layer" not in rates  # it takes those of its method
    assert {"magnitude, as NeuroAda", "magnitude, layer"} <= set(costs)
    shown = " ".join(done.stdout.split())
    titles = TITLE.findall((output / "transfer.md").read_text(encoding="utf-8"))
    assert titles == list(lines)
    assert len(titles) == 5
    assert all(title in shown for title in titles)
    assert shown.endswith(f"written: {', '.join(str(output / name) for name in (CELLS, TABLES, PICTURE))}")


def test_a_run_that_was_killed_goes_on_with_methods_added(whole_run, options, tmp_path):
    lines = (whole_run[1] / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(lines[:5])
    (tmp_path / "cells.jsonl").write_text(kept + lines[5][:-20], encoding="utf-8")  # the fifth cell was being written
    arguments = ("--methods", "linear,magnitude-layer", "--seeds", 1, "--jobs", 1, "--baseline", "linear")
    done = run("transfer", *options, *arguments, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    after = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    assert after.startswith(kept)  # what was finished has not been run again
    records = {record.cell: record for record in read(tmp_path / "cells.jsonl")[1]}
    assert len(records) == len(after.splitlines()) - 1
    for record in read(whole_run[1] / "cells.jsonl")[1]:
        assert results(records.pop(record.cell)) == results(record)
    assert set(records) == {Cell(task, "linear", None, 0, None) for task in ("bright", "stripes")}
    test = [record.test for record in sorted(records.values(), key=lambda record: record.group)]
    means = [*map(percent, test * 2), percent(sum(test) / 2)]
    accuracies = next(iter(tables_of(tmp_path / "transfer.md").values()))
    assert accuracies["linear head, frozen model"] == ["0.00", "1", *means]


@pytest.fixture
def finished(whole_run, tmp_path):
    (tmp_path / "cells.jsonl").write_bytes((whole_run[1] / "cells.jsonl").read_bytes())
    return tmp_path


@pytest.fixture
def no_cells(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a cell would be run")

    monkeypatch.setattr(campaign, "fill_table", refuse)


@pytest.mark.usefixtures("no_cells")
def test_a_report_runs_nothing(whole_run, finished, options):
    before = (finished / "cells.jsonl").read_bytes()
    # other methods and seeds are asked for, but what is there counts
    done = run(
        "transfer",
        *options,
        "--methods",
        "fps",
        "--seeds",
        9,
        "--baseline",
        "linear",
        "--report",
        "--output",
        finished,
    )
    assert done.exit_code == 0, done.output
    assert (finished / "cells.jsonl").read_bytes() == before
    tables = (finished / "transfer.md").read_text(encoding="utf-8")
    assert tables == (whole_run[1] / "transfer.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_cells")
def test_a_report_on_some_tasks_leaves_the_others_out(finished, options):
    done = run("transfer", *options, "--only", "bright", "--baseline", "linear", "--report", "--output", finished)
    assert done.exit_code == 0, done.output
    tables = (finished / "transfer.md").read_text(encoding="utf-8")
    assert "bright" in tables
    assert "stripes" not in tables


def test_a_run_of_which_nothing_is_missing_starts_no_process(finished, options, monkeypatch):
    monkeypatch.setattr("peft_fps.benchmarks.transfer.worker_pool.run_cell", None)
    before = (finished / "cells.jsonl").read_bytes()
    done = run("transfer", *options, "--methods", "magnitude-layer", "--seeds", 1, "--output", finished)
    assert done.exit_code == 0, done.output
    assert (finished / "cells.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_cells")
def test_without_matplotlib_the_picture_is_skipped_and_said_so(finished, options, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("transfer", *options, "--report", "--output", finished)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in finished.iterdir()) == ["cells.jsonl", "transfer.md"]
    assert "transfer.png" not in done.stdout
    assert "pip install peft-fps[benchmark]" in caplog.text


def test_the_list_of_methods():
    done = run("transfer", "--list")
    assert done.exit_code == 0
    runnable = [[name, arm.label] for name, arm in ARMS.items() if not arm.retired]
    assert [line.split(maxsplit=1) for line in done.stdout.splitlines()] == runnable


@pytest.mark.parametrize("name", ["transfer", "overlap"])
def test_help_is_a_page_to_work_from(name):
    done = run(name, "--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert done.exit_code == 0
    explained = set(re.findall(r"--[a-z-]+", text))
    assert {"--model", "--tasks", "--only", "--methods", "--seeds", "--image-size", "--output"} <= explained
    examples = re.findall(rf"\$ peft-fps benchmark {name}(.*)", text)
    assert examples
    settable = {opt for parameter in parameters(name) for opt in parameter.opts}
    for line in examples:
        assert set(re.findall(r"--[a-z-]+", line)) <= settable


def parameters(name):
    group = typer.main.get_command(app)
    return group.commands["benchmark"].commands[name].params


MISTAKES = [
    (["--methods", "lunch"], 1, "--methods has 'lunch', which is none of linear, full"),
    (["--methods", "fps,lunch*"], 1, "--methods has 'lunch*'"),
    (["--methods", ","], 1, "--methods is empty"),
    (["--methods", "fps,try-clip"], 1, "--methods has try-clip, which did not win and left the package"),
    (["--only", "lunch,stripes"], 1, "lunch: no such task in"),
    (["--only", ""], 1, "--only is empty, expected some of bright, stripes"),
    (["--tuned-share", 0], 1, "--tuned-share is 0.0, expected a share above 0"),
    (["--tuned-share", 1.5], 2, "tuned-share"),
    (["--budgets", "much"], 1, "--budgets has 'much', expected shares above 0 and up to 1"),
    (["--budgets", "0.1,0"], 1, "--budgets has '0'"),
    (["--budgets", "1.01"], 1, "--budgets has '1.01'"),
    (["--budgets", "nan"], 1, "--budgets has 'nan'"),
    (["--budgets", ""], 1, "--budgets is empty"),
    (["--baseline", "lunch"], 1, "--baseline is 'lunch', expected one of linear, full"),
    (["--baseline", "fps*"], 1, "--baseline is 'fps*'"),
    (["--tasks", "no/such/folder"], 1, "expected a folder with one folder of labelled images per task"),
    (["--report"], 1, "which holds no cells.jsonl: nothing has been run there"),
    (["--seeds", 0], 2, "seeds"),
    (["--jobs", 0], 2, "jobs"),
    (["--precision", "fp8"], 2, "precision"),
    (["--image-size", 1], 2, "image-size"),
]


def check_mistake(done, code, text):
    assert done.exit_code == code, done.output
    assert text in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.usefixtures("no_cells")
@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: None)
def test_mistakes_are_one_clear_sentence(options, tmp_path, arguments, code, text):
    check_mistake(run("transfer", *options, *arguments, "--output", tmp_path / "new"), code, text)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_cells")
@pytest.mark.parametrize("how", [[], ["--report"]])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--epochs", 3], "'epochs': 3"),
        (["--tuned-share", 0.25], "'tuned_share': 0.25"),
        (["--image-size", 32], "'image_size': 32"),
    ],
)
def test_another_setting_in_the_output_is_refused(finished, options, how, change, text):
    before = (finished / "cells.jsonl").read_bytes()
    done = run("transfer", *options, *change, *how, "--output", finished)
    check_mistake(done, 1, "holds cells of the setting")
    assert (finished / "cells.jsonl").read_bytes() == before
    assert text in run("transfer", *options, *change, "--verbose", *how, "--output", finished).output


@pytest.mark.usefixtures("no_cells")
def test_garbage_in_the_output_is_refused(options, tmp_path):
    (tmp_path / "cells.jsonl").write_text("lunch\n", encoding="utf-8")
    for how in ([], ["--report"]):
        done = run("transfer", *options, *how, "--output", tmp_path)
        check_mistake(done, 1, "holds no cells of a transfer benchmark")


@pytest.mark.parametrize("error", [ValueError("no room"), RuntimeError("a process died"), ImportError("no kornia")])
def test_a_cell_that_cannot_be_run_is_no_traceback(options, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(campaign, "fill_table", fail)
    check_mistake(run("transfer", *options, "--output", tmp_path), 1, f"Error: {error}")


def test_rows_are_every_method_with_every_budget_and_each_once():
    assert table_rows(["linear", "fps"], ["0.1", "0.01"]) == [("linear", None), ("fps", 0.1), ("fps", 0.01)]
    assert table_rows(["fps", "fps-*-images", "fps*-images", "fps"], ["0.1"]) == [
        ("fps", 0.1),
        *((f"fps-{images}-images", 0.1) for images in (8, 32, 128)),
    ]
    assert [method for method, _ in table_rows(["*"], ["1"])] == [name for name in ARMS if not ARMS[name].retired]
    assert table_rows(["try-clip"], ["0.1"]) == [("try-clip", 0.1)]  # which is retired, for its report
    assert table_rows(["fps"], ["0.1", "0.10"]) == [("fps", 0.1)]


def test_tasks_are_those_asked_for_each_once(setting):
    assert chosen_tasks(setting, None) == ["bright", "stripes"]
    assert chosen_tasks(setting, ["stripes", "stripes"]) == ["stripes"]


def test_overlap_compares_selections(setting, tmp_path):
    output = tmp_path / "new"
    where = ("--model", setting.model, "--tasks", setting.tasks, "--image-size", setting.image_size, "--batch-size", 4)
    arguments = ("--methods", "magnitude,random,fps-8*", "--budget", SHARE, "--seeds", 2, "--only", "stripes,bright")
    done = run("overlap", *where, *arguments, "--output", output)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in output.iterdir()) == ["overlap.json", "overlap.md"]
    found = json.loads((output / "overlap.json").read_text(encoding="utf-8"))
    assert (found["tasks"], found["share"], found["seeds"]) == (["stripes", "bright"], SHARE, 2)
    assert found["setting"]["model"] == "tiny"
    by_method = {agreement.pop("method"): agreement for agreement in found["agreements"]}
    assert list(by_method) == ["fps", "magnitude", "random", "fps-8-images"]
    # all images in another order, and no data at all
    assert by_method["fps"]["reference"] == 1
    assert by_method["fps"]["seeds"] > 0.99
    assert by_method["magnitude"]["seeds"] == by_method["magnitude"]["tasks"] == 1
    assert by_method["random"]["tasks"] == 1
    assert by_method["random"]["seeds"] < 0.2
    assert by_method["random"]["reference"] < by_method["magnitude"]["reference"] < 1
    assert by_method["fps-8-images"]["seeds"] < by_method["fps"]["seeds"]
    text = (output / "overlap.md").read_text(encoding="utf-8")
    assert "| random " in text
    assert f"{by_method['magnitude']['reference']:.3f}" in text
    assert f"{by_method['magnitude']['reference']:.3f}" in done.stdout
    assert str(output / "overlap.json") in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--methods", "lora"], 1, "--methods has 'lora', which selects no entries"),
        (["--methods", "lunch"], 1, "--methods has 'lunch'"),
        (["--methods", "try-clip"], 1, "--methods has try-clip, which did not win and left the package"),
        (["--reference", "lunch"], 1, "--reference is 'lunch', expected one of linear, full"),
        (["--reference", "fps*"], 1, "--reference is 'fps*'"),
        (["--reference", "linear"], 1, "'linear', which selects no entries"),
        (["--budget", 0], 1, "--budget is 0.0, expected a share above 0"),
        (["--only", "lunch"], 1, "lunch: no such task in"),
        (["--only", ""], 1, "--only is empty"),
        (["--methods", "fps-128-images"], 1, "fps-128-images selects from 128 images"),
        (["--seeds", 0], 2, "seeds"),
    ],
)
def test_mistakes_in_a_comparison(setting, tmp_path, arguments, code, text):
    where = ("--model", setting.model, "--tasks", setting.tasks, "--image-size", 16, "--budget", SHARE, "--seeds", 1)
    done = run("overlap", *where, "--only", "stripes", *arguments, "--output", tmp_path / "new")
    check_mistake(done, code, text)
    assert not (tmp_path / "new").exists()


def test_the_rates_of_a_run_that_took_rates_itself(tmp_path):
    taken = {("fps", "a"): 0.03, ("fps", "b"): 0.003, ("magnitude", "a"): 0.01}
    store = Store(tmp_path / CELLS, SETTING, {}, taken)
    for finished in (*chosen("magnitude", "a", best=0.003), *chosen("random", "b", best=0.03)):
        store.add(finished)
    found = campaign.earlier_rates(tmp_path, SETTING)
    heads = {("linear", "a"): None, ("linear", "b"): None}  # which have no rate
    assert found == taken | heads | {("magnitude", "a"): 0.003, ("random", "b"): 0.03}


def test_rates_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"--rates-of is .* which holds no cells.jsonl"):
        campaign.earlier_rates(tmp_path, SETTING)
