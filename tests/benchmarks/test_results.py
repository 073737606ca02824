"""The tables in the committed results' README are those of the data beside it."""

import json
import re
import shlex
import shutil
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import pytest
from typer.testing import CliRunner

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.campaign import table_rows
from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.benchmarks.transfer.plan import pending, trials
from peft_fps.benchmarks.transfer.retired_arms import LAST_COMMIT, RETIRED
from peft_fps.benchmarks.transfer.store import read
from peft_fps.benchmarks.transfer.transfer_tables import Results
from peft_fps.cli.app import app
from tests.support.documents import RESULTS, blocks, commands, rows
from tests.support.helpers import ROOT


README = (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_cost_table_is_the_measured_one() -> None:
    assert (RESULTS / "cost.md").read_text(encoding="utf-8").strip() in README
    assert (RESULTS / "cost.png").stat().st_size > 0
    measured = json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))
    assert measured["evidence"]
    assert measured["date"] in README


def test_the_ratios_with_the_systems_malloc_are_measured() -> None:
    measured = json.loads((RESULTS / "step_system_malloc.json").read_text(encoding="utf-8"))
    seconds = {name: raw["median"] for name, raw in measured["rows"]["step"]["raw"]["seconds"].items()}
    installed, alone = (seconds[name] / seconds["lora"] for name in ("fps", "fps-pytorch"))
    assert measured["evidence"]
    assert measured["workload"]["system_malloc"]
    assert f"{installed:.2f} of LoRA's as installed and {alone:.2f} with PyTorch alone" in README


def test_the_ratios_of_the_default_are_measured() -> None:
    measured = json.loads((RESULTS / "recipe.json").read_text(encoding="utf-8"))
    step, peak, means = (figure["value"] for figure in measured["rows"]["recipe"]["figures"])
    assert measured["evidence"]
    assert f"({step:.2f} of it in five rounds, which is noise) in the same memory" in README
    assert peak == 1
    assert f"{means:.2f} of bare forward passes over their 8 batches" in README.replace("\n", " ")


def test_the_language_models_table_is_the_measured_one() -> None:
    rows = json.loads((RESULTS / "decoder.json").read_text(encoding="utf-8"))["rows"]
    methods = ("full", "supertuning", "lora", "fps", "floor")
    seconds = [f"{rows['step']['raw']['seconds'][name]['median']:.3f}" for name in methods]
    mebibytes = [f"{rows['memory']['raw']['bytes'][name]['peak'] / 2**20:,.0f}" for name in methods]
    assert f"| step, s | {' | '.join(seconds)} |" in README
    assert f"MiB | {' | '.join(mebibytes)} |" in README


def test_the_tables_of_accuracies_are_those_of_the_kept_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer"
    shutil.copy(kept / "cells.jsonl", tmp_path)
    command = next(command for command in commands(README) if "benchmark transfer" in command)
    options = re.search(r"benchmark transfer (.*)", command)[1].split()
    model = json.loads((kept / "cells.jsonl").read_text().split("\n")[0])["setting"]["model"]
    given = dict(zip(options[::2], options[1::2], strict=True)) | {"--model": model, "--output": str(tmp_path)}
    arguments = [part for option in given.items() for part in option]
    ended = CliRunner().invoke(app, ["benchmark", "transfer", "--report", *arguments])
    assert ended.exit_code == 0, ended.output
    tables = (tmp_path / "transfer.md").read_text()
    assert tables == (kept / "transfer.md").read_text()
    section = README[README.index("### The tables") : README.index("## How firm a selection is")]
    printed = re.findall(r"^\*\*[^\n]+\*\*\n\n\|.*?(?=\n\n)", section, re.DOTALL | re.MULTILINE)
    assert len(printed) > 5
    for table in printed:
        assert table in tables


def test_the_printed_commands_run_the_kept_cells_and_no_others() -> None:
    header, records = read(RESULTS / "transfer" / "cells.jsonl")
    setting = Setting(tasks="", **header["setting"])
    kept, asked = {record.cell for record in records}, set()
    for command in re.findall(r"benchmark transfer (--.*)", "\n".join(commands(README))):
        words = shlex.split(command)
        options = dict(zip(words[::2], words[1::2], strict=True))
        tasks, seeds = options["--only"].split(","), int(options["--seeds"])
        rows = table_rows(options["--methods"].split(","), options["--budgets"].split(","))
        assert pending(tasks, rows, seeds, setting, records) == []
        asked |= {cell for row, task in product(rows, tasks) for cell in trials(row[0], task, setting)}
        asked |= {cell for cell in kept if cell.row in rows and cell.task in tasks and cell.seed < seeds}
    assert kept == asked


def test_the_table_of_files_counts_the_kept_cells() -> None:
    _, records = read(RESULTS / "transfer" / "cells.jsonl")
    methods = {record.cell.method for record in records}
    tasks = {record.cell.task for record in records}
    assert len(tasks) == 8
    assert f"ran last in commit {LAST_COMMIT}." in README
    assert f"accuracy of {len(methods)} methods and variants on eight image tasks" in README
    assert f", {len(records)} finished cells" in README


def test_the_table_of_overlaps_is_the_measured_one() -> None:
    folder = RESULTS / "overlap"
    assert (folder / "overlap.md").read_text(encoding="utf-8").strip() in README
    measured = json.loads((folder / "overlap.json").read_text(encoding="utf-8"))
    command = next(block for block in blocks(README, "bash") if "benchmark overlap" in block)
    assert f"--only {','.join(measured['tasks'])} " in command
    assert f"--seeds {measured['seeds']} " in command
    found = [agreement["method"] for agreement in measured["agreements"]]
    methods = re.search(r"--methods (\S+)", command)[1].split(",")
    reference = re.search(r"--reference (\S+)", command)[1]
    assert found[0] == reference
    assert sorted(found) == sorted([reference, *methods])


def test_the_importances_table_is_the_measured_one() -> None:
    measured = json.loads((RESULTS / "importance.json").read_text(encoding="utf-8"))
    raw = measured["rows"]["importance"]["raw"]
    assert measured["evidence"]
    forward = raw["seconds"]["forward"]["median"]
    for name, peak in raw["peak_bytes"].items():
        time = raw["seconds"][name]["median"] / forward
        assert f"| {name} | {time:.1f} | {peak / 2**20:,.0f} |" in README


def test_the_table_of_token_selection_is_the_measured_one() -> None:
    measured = json.loads((RESULTS / "tokens.json").read_text(encoding="utf-8"))
    raw = measured["rows"]["tokens"]["raw"]
    assert measured["evidence"]
    assert [block + 1 for block in raw["blocks"]] == [4, 7, 10]
    step = {name: found["median"] for name, found in raw["step"].items()}
    labels = {"lora": "LoRA r=16", "floor": "frozen floor", "keep-1": "FPS, all patches"}
    for name, seconds in step.items():
        label = labels.get(name, f"FPS, keep rate {name.removeprefix('keep-')}")
        peak, most = raw["bytes"][name]["peak"], raw["bytes"]["lora"]["peak"]
        figures = f"{seconds:.3f} | {seconds / step['lora']:.2f} | {peak / 2**20:,.0f} | {peak / most:.2f}"
        assert f"| {label} | {figures} |" in README
        if name in raw["inference"]:
            share = raw["inference"][name]["median"] / raw["inference"]["keep-1"]["median"]
            assert f"| {label} | {figures} | {share:.2f} |" in README


def test_the_page_on_accuracy_with_fewer_tokens_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_tokens"
    page = (kept / "README.md").read_text(encoding="utf-8")
    shutil.copy(kept / "cells.jsonl", tmp_path)
    command = next(command for command in commands(page) if "benchmark transfer" in command)
    words = shlex.split(command)[3:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    header, records = read(kept / "cells.jsonl")
    assert f", {len(records)} cells |" in README
    patterns = options["--methods"].split(",")
    named = {name for name in ARMS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert {record.cell.method for record in records} == named
    for name in ("--rates-of", "--methods", "--seeds"):  # of a run, not of its report
        del options[name]
    options |= {"--model": header["setting"]["model"], "--output": str(tmp_path), "--steps": str(kept / "cost.json")}
    ended = CliRunner().invoke(app, ["benchmark", "transfer", "--report", *(x for o in options.items() for x in o)])
    assert ended.exit_code == 0, ended.output
    tables = (tmp_path / "transfer.md").read_text(encoding="utf-8")
    assert tables == (kept / "transfer.md").read_text(encoding="utf-8")
    assert (tmp_path / "steps.png").stat().st_size > 0
    accuracy = {
        line[0]: float(line[-1].split()[0])
        for line in rows(tables)
        if len(line) == 15 and line[0] != "method" and line[1][0].isdigit()
    }
    assert "63.7, against 63.6" in page
    assert (accuracy["FPS, with biases, keep rate 0.9, fixed blocks"], accuracy["FPS, with biases"]) == (63.7, 63.6)
    assert "(60.8 and 59.9;" in page
    assert (accuracy["FPS, with biases, keep rate 0.7, fixed blocks"], accuracy["LoRA"]) == (60.8, 59.9)
    step = json.loads((kept / "cost.json").read_text(encoding="utf-8"))["rows"]["tokens"]["raw"]
    assert (
        f"{step['step']['keep-0.7']['median'] / step['step']['lora']['median']:.2f} of the time of LoRA's step" in page
    )
    assert f"{step['bytes']['keep-0.7']['peak'] / step['bytes']['lora']['peak']:.2f} of its memory" in page


def reported(kept: Path, folder: Path) -> str:
    """The tables of a results folder, which its page's command makes again; the list of files tells their number."""
    shutil.copy(kept / "cells.jsonl", folder)
    page = (kept / "README.md").read_text(encoding="utf-8")
    words = shlex.split(next(command for command in commands(page) if "--report" in command))[1:]
    header, records = read(kept / "cells.jsonl")
    words[words.index("--output") + 1] = str(folder)
    words[words.index("--model") + 1] = header["setting"]["model"]
    assert f", {len(records)} cells |" in README
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    tables = (folder / "transfer.md").read_text(encoding="utf-8")
    assert tables == (kept / "transfer.md").read_text(encoding="utf-8")
    return tables


def test_the_page_on_how_to_train_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_recipe"
    page = (kept / "README.md").read_text(encoding="utf-8")
    header, records = read(kept / "cells.jsonl")
    tables = reported(kept, tmp_path)
    means = {line[0]: (line[2], line[-1]) for line in rows(tables) if len(line) == 15 and line[-1][:1].isdigit()}
    alone = {"FPS, with biases", "try: centred inputs", "FPS, the default", "try: low rates"}
    besides = ("layer", "output-gradient-layer", "weights and biases of norms", "stochastic depth 0.1")
    added = {f"try: centred inputs, low rates, {each}" for each in besides}
    assert means.keys() >= alone | added
    for label in alone | added:
        assert "| {} | {} |".format(*means[label]) in page, label
    rates = {(method, task): rate for method, task, rate in header["rates"]}
    by_seed = Results(records, Setting(tasks="", **header["setting"]), rates, split="validation")
    found, default = (
        [mean(seeds[seed] for seeds in by_seed.accuracies((name, 0.0077)).values()) for seed in (0, 1)]
        for name in ("fps-default", "fps-biases")
    )
    ahead = [f"{100 * (one - other):.1f}" for one, other in zip(found, default, strict=True)]
    assert f"by {' and '.join(ahead)}." in page
    _, others = read(RESULTS / "transfer_tokens" / "cells.jsonl")
    cells = [record for record in (*others, *records) if record.cell.seed == 0]
    losses = {(record.cell.method, record.cell.task): record.loss for record in cells}
    for method, task, text in (
        ("fps-biases", "eth80_azimuth", "epochs is {:.2f}"),
        ("full", "eth80_azimuth", "fine-tuning {:.2f} (["),
        ("try-fitted-head-tenth", "eth80_azimuth", "to {:.2f}, on"),
        ("try-fitted-head-tenth", "caltech101", "`caltech101` it is {:.2f},"),
    ):
        assert text.format(losses[method, task]) in page.replace("\n", " "), text


ADDED = {
    "by block": "block",
    "the lowest scores": "bottom",
    "output scales": "scales",
    "weight decay 0.1": "weight decay 0.1",
    "one entry per neuron, the rest by layer": "neuron-then-layer",
    "LIFT": "lift",
    "LIFT × mean size of the input": "lift-activation",
    "RIA": "ria",
    "OWL": "owl",
    "AlphaPruning": "alpha",
    "FPS's score × mean size of the output's gradient": "output-gradient",
}


def test_the_page_on_candidates_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_candidates"
    page = (kept / "README.md").read_text(encoding="utf-8")
    tables = reported(kept, tmp_path)
    header, records = read(kept / "cells.jsonl")
    rates = {(method, task): rate for method, task, rate in header["rates"]}
    by_seed = Results(records, Setting(tasks="", **header["setting"]), rates, split="validation")
    default = by_seed.accuracies(("fps-default", 0.0077))
    names = {label.rpartition("low rates, ")[2]: name for name, (label, _) in RETIRED.items()}
    shown = {line[0]: line for line in rows(page) if len(line) == 4}
    for text, label in ADDED.items():
        found = by_seed.accuracies((names[label], 0.0077))
        differences = [100 * (seeds[0] - default[task][0]) for task, seeds in found.items()]
        count, points = len(differences), mean(differences)
        half = stdev(differences) / count**0.5 * {4: 3.182446, 6: 2.570582, 8: 2.364624}[count]  # Student's t, 97.5 %
        assert abs(points) < half  # noise, as the page says of all
        assert shown[text] == [text, str(count), f"{points:+.2f}", f"{points - half:+.1f} … {points + half:+.1f}"]
    printed = {  # by the tasks that they name
        tuple(sorted(words[words.index("--only") + 1].split(",")))
        for words in (line.split() for line in page.splitlines())
        if "--only" in words
    }
    assert {tuple(sorted(by_seed.accuracies((name, 0.0077)))) for name in names.values()} - {()} == printed
    assert f"git checkout {LAST_COMMIT}" in page
    alpha = by_seed.accuracies((names["alpha"], 0.0077))
    second = 100 * mean(seeds[1] - default[task][1] for task, seeds in alpha.items())
    ((_, both, interval, *_),) = (line for line in rows(tables) if line[0].endswith(" alpha") and "…" in line[2])
    assert f"ahead by {second:.2f}: {both} with both, {interval} over tasks." in page.replace("\n", " ")


def test_the_page_on_the_default_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_default"
    page = (kept / "README.md").read_text(encoding="utf-8")
    tables = reported(kept, tmp_path)
    lines = [line for line in rows(tables) if line[0] in DEFAULT_AND_OTHERS]
    accuracies = {line[0]: line for line in lines if len(line) == 15 and line[2] in ("1", "2", "3")}
    differences = {line[0]: line for line in lines if len(line) == 6}
    assert accuracies.keys() == set(DEFAULT_AND_OTHERS)
    for name, (_, trained, seeds, *_, mean_accuracy) in accuracies.items():
        compared = differences.get(name, ("", "", "", "", "", ""))
        shown = (name, trained, seeds, mean_accuracy, *compared[1:4], compared[5])
        assert f"| {' | '.join(shown)} |".replace("|  |", "| |") in page.replace("|  |", "| |"), shown
    default, full, _, gps, *_ = (accuracies[name][-1].split()[0] for name in DEFAULT_AND_OTHERS)
    summary = f"it reaches {default}, full fine-tuning {full} and GPS with biases {gps} (three seeds)"
    assert summary in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")


def test_every_seed_of_the_default_is_ahead() -> None:
    kept = RESULTS / "transfer_default"
    page = (kept / "README.md").read_text(encoding="utf-8").replace("\n  ", " ")
    _, records = read(kept / "cells.jsonl")
    means = {
        method: [
            mean(100 * each.test for each in records if (each.cell.method, each.cell.seed) == (method, seed))
            for seed in range(3)
        ]
        for method in ("fps-default", "full", "fps-biases", "gps-biases")
    }
    default, full, plain, gps = ("{:.1f}, {:.1f} and {:.1f}".format(*values) for values in means.values())
    assert f"it has {default}, full fine-tuning {full}, FPS with biases {plain}, GPS {gps}." in page
    assert all(min(means["fps-default"]) > max(means[other]) for other in ("full", "fps-biases", "gps-biases"))


def test_what_the_page_on_the_default_says_of_its_parts() -> None:
    kept = RESULTS / "transfer_default"
    page = (kept / "README.md").read_text(encoding="utf-8").replace("\n  ", " ")
    records = read(kept / "cells.jsonl")[1]
    tests = {(each.cell.method, each.cell.task, each.cell.seed): 100 * each.test for each in records}
    rates = {each.cell.task: each.cell.learning_rate for each in records if each.cell.method == "fps-default"}

    def mean_of(method: str, *tasks: str) -> float:
        return mean(
            value for (name, task, _), value in tests.items() if name == method and (not tasks or task in tasks)
        )

    centred, default = mean_of("try-centred"), mean_of("fps-default")
    assert f"centring alone does as well as both parts ({centred:.1f} and {default:.1f})" in page
    magnitude, fps, drawn = (mean_of(f"{name}-biases") for name in ("magnitude", "fps", "random"))
    assert f"({magnitude:.1f} and {fps:.1f}), and random entries are {fps - drawn:.1f} behind" in page
    behind = (
        mean_of("fps-default", *tasks) - mean_of("magnitude-default", *tasks)
        for tasks in ((), ("eth80_azimuth",), ("omniglot100",))
    )
    text = "magnitude is {:.1f} behind, on `eth80_azimuth` by {:.1f} and on `omniglot100` by {:.1f}."
    assert text.format(*behind) in page
    failed = [f"{tests['lora', 'eth80_azimuth', seed]:.1f}" for seed in range(3)]
    text = "One of LoRA's does on `eth80_azimuth`: {}, then {} and {}, where the default has {:.1f}."
    assert text.format(*failed, mean_of("fps-default", "eth80_azimuth")) in page
    assert {seed for _, _, seed in tests} == {0, 1, 2}
    assert len(tests) == 288
    one_rate = {
        (each.cell.task, each.cell.seed): 100 * each.test for each in read(kept / "one_rate" / "cells.jsonl")[1]
    }
    assert {task for task, _ in one_rate} == {task for task, rate in rates.items() if rate != 0.01}
    found = mean(
        one_rate.get((task, seed), value) for (name, task, seed), value in tests.items() if name == "fps-default"
    )
    assert f"the default has {found:.1f} with three seeds" in page


def test_the_page_on_other_tasks_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_other"
    page = (kept / "README.md").read_text(encoding="utf-8")
    tables = reported(kept, tmp_path)
    names = ("FPS, the default", "full fine-tuning", "GPS, with biases")
    lines = [line for line in rows(tables) if line[0] in names]
    accuracies = {line[0]: line for line in lines if len(line) == 13 and line[2] == "1"}
    for name in names:
        assert f"| {' | '.join([name, *accuracies[name][3:9], accuracies[name][-1]])} |" in page
    compared = {line[0]: line for line in lines if len(line) == 6}
    found: dict[str, dict[str, list[float]]] = {}
    for folder in ("transfer_default", "transfer_other"):
        for each in read(RESULTS / folder / "cells.jsonl")[1]:
            found.setdefault(each.cell.method, {}).setdefault(each.cell.task, []).append(100 * each.test)
    means = {method: {task: mean(values) for task, values in tasks.items()} for method, tasks in found.items()}
    for method, name in (("full", "full fine-tuning"), ("gps-biases", "GPS, with biases")):
        assert means[method].keys() == means["fps-default"].keys()
        differences = [means[method][task] - means["fps-default"][task] for task in means[method]]
        assert len(differences) == 14
        assert sum(difference < 0 for difference in differences) == 9
        half = 2.160369 * stdev(differences) / 14**0.5  # Student's t with 13 degrees of freedom, 97.5 %
        interval = f"{mean(differences) - half:.1f} … {mean(differences) + half:+.1f}"
        shown = (name, *compared[name][1:3], f"{mean(differences):.2f}", interval)
        assert f"| {' | '.join(shown)} |" in page
    best: dict[tuple[str, str], float] = {}
    for each in read(kept / "rates" / "cells.jsonl")[1]:
        key = (each.cell.method, each.cell.task)
        best[key] = max(best.get(key, 0), 100 * each.validation)
    default, full = (
        mean(value for (method, _), value in best.items() if method == name) for name in ("fps-default", "full")
    )
    assert f"level on the mean, {default:.1f} and {full:.1f}:" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "README.md) {}, {} and {} (one seed)".format(*(accuracies[name][-1] for name in names)) in readme


DEFAULT_AND_OTHERS = (
    *("FPS, the default", "full fine-tuning", "FPS, with biases", "GPS, with biases"),
    *("magnitude, with biases", "random, with biases", "BitFit", "Super-Tuning (PEFT)", "LoRA"),
    *("try: centred inputs", "try: low rates", "magnitude, trained as the default"),
)


def test_the_page_on_texts_is_that_of_its_cells(tmp_path: Path) -> None:
    kept = RESULTS / "transfer_text"
    page = (kept / "README.md").read_text(encoding="utf-8")
    tables = reported(kept, tmp_path)
    names = ("FPS, the default", "full fine-tuning", "LoRA", "FPS, with biases", "FPS")
    lines = [line for line in rows(tables) if line[0] in names]
    accuracies = {line[0]: line for line in lines if len(line) == 7 and line[2] in ("1", "3")}
    differences = {line[0]: line for line in lines if len(line) == 6}
    for name in names:
        _, trained, seeds, subj, trec, _, both = accuracies[name]
        _, points, interval, _, _, verdict = differences.get(name, [""] * 6)
        shown = " | ".join((name, trained, seeds, trec, subj, both, points, interval, verdict))
        assert f"| {shown} |".replace("|  |", "| |") in page.replace("|  |", "| |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    default, full, lora = (accuracies[name][-1].split()[0] for name in names[:3])
    assert f"transfer_text/README.md) {default}, {full} and LoRA {lora}, level as well." in readme
    _, records = read(kept / "cells.jsonl")
    tests = {
        (each.cell.method, each.cell.task, each.cell.seed, each.cell.learning_rate): each.test for each in records
    }
    assert min(tests[key] for key in tests if key[3] != 0.03 and key[0] != "full") > 0.88
    shown = [f"{100 * tests[method, task, 0, 0.03]:.1f}" for method, task in AT_THE_HIGHEST_RATE]
    sentence = (
        "with {}, and LoRA on both, with {} and {}; half of Subj's texts belong to each class. The default loses far"
    )
    assert sentence.format(*shown) in page.replace("\n ", "")
    assert "there: {} and {}. At".format(*shown[3:]) in page
    header, earlier = read(kept / "float32" / "cells.jsonl")
    assert (header["setting"]["precision"], len(earlier)) == ("fp32", 16)
    pairs = [
        (100 * each.test, 100 * tests[key])
        for each in earlier
        if (key := (each.cell.method, each.cell.task, each.cell.seed, each.cell.learning_rate)) in tests
        and each.cell.learning_rate != 0.03
    ]
    assert max(abs(one - other) for one, other in pairs) == pytest.approx(1.8, abs=0.05)
    assert min(one - other for one, other in pairs) < 0 < max(one - other for one, other in pairs)


AT_THE_HIGHEST_RATE = (
    *(("fps", "trec6"), ("lora", "trec6"), ("lora", "subj")),
    *(("fps-default", "trec6"), ("fps-default", "subj")),
)
