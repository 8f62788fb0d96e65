"""Models of the hub, fetched by HTTP from a hub on this machine."""

from pathlib import Path

import numpy as np
import pytest
from data.hub_server import (
    GATED,
    NOT_FOUND,
    HubServer,
    hub_model,
    hub_reader,
)

from bertkern.models import BertConfig, BertForMaskedLM

pytest.importorskip("huggingface_hub")
SECONDS = 30  # that the client may sleep, all in all, before the user has his error
HURRY = 0.4  # seconds for an answer, in place of ten or of any number


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(server, home):
    with hub_reader(server.address, home) as call:
        yield call


@pytest.fixture
def hub(server):
    """The server, whose faults end with the test."""
    yield server
    server.heal()


@pytest.fixture
def publish(hub):
    """Put a random model on the hub; its tensors."""

    def call(name):
        config = BertConfig(
            vocab_size=120,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
        )
        model = BertForMaskedLM(config)
        folder = hub.folder("models", name)
        model.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(f"word{n}" for n in range(120)))
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "pytorch_model.bin").write_bytes(b"not read")
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    return call


def assert_equal(read, tensors):
    assert read.error is None
    assert read.value.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read.value[name], tensor, strict=True, err_msg=name)


def test_tensors_are_those_saved(hub, run, publish):
    tensors = publish("user/model")
    read = run(hub_model, "user/model")
    assert_equal(read, tensors)
    assert read.settings_stay
    assert hub.asked("GET /user/model/resolve/", "/vocab.txt")
    assert not hub.asked("user/model", ".bin")  # what is not read is not fetched
    assert not hub.asked("user/model", "README.md")


def test_second_call_fetches_nothing_again(hub, run, publish):
    tensors = publish("user/twice")
    run(hub_model, "user/twice")
    before = len(hub.asked("GET /user/twice/resolve/"))
    assert_equal(run(hub_model, "user/twice"), tensors)
    assert len(hub.asked("GET /user/twice/resolve/")) == before > 0


def test_new_weights_on_the_hub_are_fetched(run, publish):
    publish("user/newer")
    run(hub_model, "user/newer")
    tensors = publish("user/newer")
    assert_equal(run(hub_model, "user/newer"), tensors)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no public model of that name on the Hugging Face hub"),
        (NOT_FOUND, "no public model of that name on the Hugging Face hub"),
        (GATED, "the Hugging Face hub gives that model only to those whom its owner lets in"),
        ((403, {}), r"the Hugging Face hub answers with an error \(403\)"),
        ((500, {}), r"the Hugging Face hub answers with an error \(500\)"),
    ],
)
def test_models_that_the_hub_does_not_give(hub, run, publish, answer, reason):
    name = "user/none"
    if answer is not None:
        name = f"user/refused{answer[0]}-{len(answer[1])}"
        publish(name)
        hub.refused[name] = answer
    read = run(hub_model, name)
    with pytest.raises(FileNotFoundError, match=rf"^{name}: no such folder, and {reason}$"):
        raise read.error
    assert read.slept <= SECONDS


@pytest.mark.parametrize(
    ("way", "step", "reason"),
    [
        ("dropped", "/revision/", r"not available from the .* hub \(Server disconnected .*\)"),
        ("dropped", "/tree/", r"not available from the .* hub \(Server disconnected .*\)"),
        ("dropped", "/vocab.txt", r"not available from the .* hub \(Server disconnected .*\)"),
        ("silent", "/revision/", "the Hugging Face hub is not reached"),
        ("silent", "/tree/", "the Hugging Face hub is not reached"),
    ],
)
def test_hub_without_an_answer(hub, run, publish, way, step, reason):
    """The client itself would wait for two of the answers for ever."""
    name = f"user/{way}-{step.strip('/')}"
    tensors = publish(name)
    getattr(hub, way).add(step)
    read = run(hub_model, name, HURRY if way == "silent" else 10)
    with pytest.raises(FileNotFoundError, match=rf"^{name}: no such folder, and {reason}$"):
        raise read.error
    assert read.slept <= SECONDS
    assert read.settings_stay
    hub.heal()
    assert_equal(run(hub_model, name), tensors)


def test_interrupted_download_is_not_taken_for_whole(hub, run, publish, home):
    tensors = publish("user/cut")
    size = (hub.root / "models/user/cut/model.safetensors").stat().st_size
    hub.cut["model.safetensors"] = size // 2
    read = run(hub_model, "user/cut")
    with pytest.raises(FileNotFoundError, match=r"user/cut: no such folder, and not available"):
        raise read.error
    assert read.slept <= SECONDS
    # nothing has the name of the weights, and a call that cannot fetch them does without nothing
    assert not list(Path(home).rglob("*user--cut/snapshots/*/model.safetensors"))
    hub.heal()
    hub.refused["user/cut"] = (500, {})
    with pytest.raises(FileNotFoundError, match=r"user/cut: no such folder, and .*\(500\)$"):
        raise run(hub_model, "user/cut").error
    hub.heal()
    assert_equal(run(hub_model, "user/cut"), tensors)
    # and now all of it is here
    hub.refused["user/cut"] = (500, {})
    assert_equal(run(hub_model, "user/cut"), tensors)


def test_interruption_that_ends_is_survived(hub, run, publish):
    """The rest alone is asked for."""
    tensors = publish("user/resumed")
    hub.cut["model.safetensors"] = 50_000
    hub.cut_once = True
    assert_equal(run(hub_model, "user/resumed"), tensors)
    assert len(hub.asked("GET /user/resumed/", "model.safetensors")) == 2


def test_hub_that_is_not_there(hub, run, publish):
    """A model that was fetched before is read; of any other the reason is told."""
    tensors = publish("user/kept")
    publish("user/other")
    assert_equal(run(hub_model, "user/kept"), tensors)
    with hub.away():
        assert_equal(run(hub_model, "user/kept"), tensors)
        read = run(hub_model, "user/other")
    with pytest.raises(
        FileNotFoundError, match=r"^user/other: no such folder, and the .* hub is not reached$"
    ):
        raise read.error
    assert read.slept <= SECONDS
