"""bertkern info."""

import json

import torch

import bertkern


def test_info_prints_what_the_function_says(run):
    result = run("info")
    assert result.exit_code == 0
    assert result.stdout.split() == str(bertkern.info()).split()


def test_info_as_json(run):
    found = json.loads(run("info", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert {backend["name"] for backend in found["backends"]} >= {"triton", "cpu", "reference"}
