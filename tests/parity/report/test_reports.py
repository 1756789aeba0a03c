"""What every report must hold to: schemas, size, and nothing from outside the file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema
from rich.console import Console

from parity.report import html, junit, markdown, terminal
from parity.report import json as json_report
from parity.report.figures import charts
from parity.report.folder import FILES, write
from parity.report.summary import command
from parity.result import Result
from parity.runner import run
from parity.selftest.faults import FAULTS
from parity.selftest.planting import planted
from tests.checkpoints import write_checkpoint
from tests.parity.report.results import CRASH, FAIL, PASS, RESULTS, finding, large

JUNIT = xmlschema.XMLSchema(Path(__file__).resolve().parents[2] / "data" / "junit-10.xsd")

MOST_HTML_BYTES = 6e6


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_junit_xml_is_valid_and_counts_what_it_holds(result: Result) -> None:
    text = junit.render(result)
    JUNIT.validate(text)
    suite = ElementTree.fromstring(text.split("?>\n", 1)[1]).find("testsuite")
    assert suite is not None
    assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
    problems = [len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error")]
    assert problems == [int(suite.get(name, "")) for name in ("failures", "errors")]
    expected = {"pass": (False, False), "fail": (True, False), "unchecked": (False, True)}[result.verdict]
    assert (problems[0] > 0, problems[1] > 0) == expected


def test_the_junit_schema_refuses_what_is_none() -> None:
    with pytest.raises(xmlschema.XMLSchemaValidationError):
        JUNIT.validate(junit.render(FAIL).replace("<testcase ", '<testcase verdict="none" '))


RECORDED = replace(
    PASS,
    environment={"torch": PASS.environment, "flax": PASS.environment},
    provenance={**PASS.provenance, "reference": "torch.trace", "other": "flax.trace"},
)
"""As `mixtral-parity compare` gives it: each side was recorded on a machine of its own."""


@pytest.mark.parametrize("result", [*RESULTS.values(), RECORDED], ids=[*RESULTS, "recorded"])
def test_result_json_is_valid_by_its_own_schema(result: Result) -> None:
    schema = json_report.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json_report.render(result)), schema)


def test_both_machines_of_a_comparison_of_recordings_are_named() -> None:
    text = markdown.render(RECORDED)
    assert "| torch side: jax | 0.10.2 |" in text
    assert "| flax side: machine | x86_64 |" in text


@pytest.mark.slow
def test_a_real_result_of_every_mode_is_valid(tmp_path: Path) -> None:
    """With a fault, so that causes, flips and failures are there, too."""
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    fault = next(fault for fault in FAULTS if fault.slug == "attention-scale")
    result = run(tmp_path / "model", inputs="quick", dtype="bfloat16", grad=True, generate=3, change=planted(fault, 1))
    modes = {"local", "operation", "propagated", "reference", "whole", "backward", "cache"}
    assert {finding.mode for finding in result.findings} == modes
    write(result, tmp_path / "report")
    jsonschema.validate(json.loads((tmp_path / "report" / "result.json").read_text()), json_report.schema())
    JUNIT.validate((tmp_path / "report" / "junit.xml").read_text())


def test_the_command_can_be_given_again() -> None:
    provenance = {"command": ["/lib/parity/__main__.py", "run", "a model/"]}
    assert command(PASS) == "mixtral-parity run 'the model/' --report report/"
    assert command(replace(PASS, provenance=provenance)) == "python -m parity run 'a model/'"


def objects(schema: Any) -> list[dict[str, Any]]:
    """List every schema of an object in a schema."""
    if isinstance(schema, list):
        return [found for each in schema for found in objects(each)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema else []
    return own + [found for each in schema.values() for found in objects(each)]


def test_the_schema_allows_no_field_that_it_does_not_name() -> None:
    for each in objects(json_report.schema()):
        assert each["additionalProperties"] is False, each["properties"].keys()


@pytest.mark.parametrize("drop", ["verdict", "points", "cost"])
def test_the_schema_refuses_a_result_without_a_field(drop: str) -> None:
    content = json.loads(json_report.render(PASS))
    del content[drop]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json_report.schema())


def test_html_of_a_large_model_is_small_enough() -> None:
    assert len(html.render(large()).encode()) <= MOST_HTML_BYTES


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_html_takes_nothing_from_outside(result: Result) -> None:
    page = re.sub(r"<script>.*?</script>", "", html.render(result), flags=re.DOTALL)
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) == {"data:,"}
    assert "@import" not in page
    assert "url(" not in page


def test_what_fails_first_is_outlined_where_it_fails_alone() -> None:
    passes_alone = finding(1, "attn_context", "operation")
    drawn = {chart.name: chart for chart in charts(replace(FAIL, findings=[*FAIL.findings, passes_alone]))}
    assert len(drawn["margins-float32-local"].figure["layout"]["shapes"]) == 1
    assert "shapes" not in drawn["margins-float32-operation"].figure["layout"]


def test_text_of_a_model_cannot_become_markup() -> None:
    page = html.render(FAIL)
    assert " &lt;not&gt;" in page
    assert "<not>" not in page.split('<script type="application/json"')[0]


def test_the_table_fits_on_a_screen() -> None:
    for result in (*RESULTS.values(), large()):
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(terminal.render(result))
        assert len(capture.get().splitlines()) <= 30


def test_all_or_nothing_is_written(tmp_path: Path) -> None:
    write(CRASH, tmp_path / "deep" / "report")
    assert {path.name for path in (tmp_path / "deep" / "report").iterdir()} == FILES.keys()
