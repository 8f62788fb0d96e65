"""`patch` and attn_implementation="bertkern" in the installed version of transformers, and in those
that transformers_versions.py has installed in build/transformers."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from integrations import transformers_versions as versions


@pytest.mark.parametrize("version", [None, *versions.VERSIONS], ids=lambda v: v or "installed")
def test_models_give_what_they_gave(version):
    if version and not (versions.folder(version) / "transformers").is_dir():
        pytest.skip("not there; python tests/integrations/transformers_versions.py installs it")
    results = versions.run(version)
    assert len(results) > 20
    faults = {r["case"]: r["faults"] for r in results if r["faults"]}
    assert not faults
    computed = [r for r in results if r["case"].startswith("patch ") and "left" in r]
    assert sum("attention" in r["parts"] for r in computed) >= 12
