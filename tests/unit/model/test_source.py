"""`model.source` finds a folder that can be loaded safely, or says what is wrong with it."""

import json
import os
import subprocess
import sys

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.model.source import HUB_FILES, check_folder, hub_name, locate_base, locate_tokenizer, pinned
from qlora_kit.schema.model import ModelConfig


@pytest.fixture
def folder(tmp_path):
    """The files of a model, with nothing inside that a check reads beyond config.json."""
    place = tmp_path / "base"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (place / "model.safetensors").touch()
    (place / "tokenizer.json").touch()
    return place


def refusal(source, revision=None):
    with pytest.raises(RecipeError) as caught:
        locate_base(ModelConfig(source=str(source), revision=revision))
    return str(caught.value)


def test_a_good_folder_is_its_own_place(folder):
    assert locate_base(ModelConfig(source=str(folder))) == folder


def test_a_home_relative_folder(folder):
    code = "from qlora_kit.model.source import locate_base\nfrom qlora_kit.schema.model import ModelConfig\n"
    code += "print(locate_base(ModelConfig(source='~/base')))"
    environment = {**os.environ, "HOME": str(folder.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder)


def test_a_file_is_not_a_folder(folder):
    message = refusal(folder / "model.safetensors")
    assert "is a file; model.source names the folder of a model" in message
    assert f"fix      model.source={folder}" in message


def test_everything_that_is_missing_comes_together(tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "has no config.json" in message
    assert "has no *.safetensors" in message
    assert "has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, spiece.model)" in message
    assert f"do       copy the model's tokenizer files into {tmp_path / 'empty'}" in message


def test_an_adapter_is_not_a_base(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "holds an adapter, not a base model" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [("{", "config.json is not a JSON object"), ("[]", "does not hold a JSON object"), ("{}", "does not say")],
)
def test_a_config_that_cannot_be_used(folder, config, reason):
    (folder / "config.json").write_text(config, encoding="utf-8")
    assert reason in refusal(folder)


def test_weights_that_are_pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert (
        "has its weights only as pickle (pytorch_model.bin), which can run code; the kit reads safetensors" in message
    )
    assert "save_pretrained" in message


def test_weights_that_are_gguf_only(folder):
    (folder / "model.safetensors").rename(folder / "model.Q4_0.gguf")
    assert "only model.Q4_0.gguf; training starts from a safetensors model" in refusal(folder)


def test_a_shard_that_is_missing(folder):
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": {f"layer{number}": shard for number, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for shard in shards[:2]:
        (folder / shard).touch()
    assert f"lacks 1 of 3 weight files: {shards[2]}" in refusal(folder)
    (folder / shards[2]).touch()
    check_folder(folder)


def test_remote_code_is_refused_for_a_type_that_transformers_does_not_know(folder):
    config = {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "modeling_strange.StrangeModel"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refusal(folder)
    assert "needs code from its own repository (model_type 'strange'), which the kit never runs" in message
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}), encoding="utf-8")
    check_folder(folder)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere", "nowhere", "a/b/c", "a/"])
def test_what_looks_like_a_path_is_looked_for_as_one(source):
    message = refusal(source)
    assert f"no such folder: {source}" in message
    assert "model.source=<a folder>, <owner>/<name> of a hub model, or demo" in message


def test_the_nearest_folder_is_named(folder):
    message = refusal(folder.with_name("bsae"))
    assert "did you mean" in message
    assert f"fix      model.source={folder}" in message


def test_a_misspelled_demo():
    assert "fix      model.source=demo" in refusal("dmeo")


@pytest.fixture
def hub(folder, monkeypatch):
    """A stand-in for the hub, whose owner/name is at one commit after the other; what it was asked."""
    import huggingface_hub

    asked = []

    def snapshot(repository, *, allow_patterns, local_files_only, revision="cached", ignore_patterns=()):
        asked.append((repository, revision))
        return str(folder if revision != "cached" else folder.parent / ("c" * 40))

    def newest(api, repository):
        asked.append(repository)
        if len(asked) > 9:
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
        return huggingface_hub.ModelInfo(id=repository, sha=str(len(asked)) * 40)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", newest)
    return asked


def test_a_commit_that_is_left_open_is_found_once_and_then_kept(hub, folder, capsys):
    found = pinned(ModelConfig(source="owner/name"))
    assert found.revision == "1" * 40
    assert pinned(found) is found
    assert locate_base(found) == folder
    assert hub == ["owner/name", ("owner/name", "1" * 40)]
    assert f"owner/name at {'1' * 40}: its newest commit" in capsys.readouterr().err


def test_a_commit_that_is_left_open_is_what_the_cache_has_where_the_hub_cannot_be_reached(hub, capsys):
    hub += [""] * 9
    assert pinned(ModelConfig(source="owner/name")).revision == "c" * 40
    assert "of owner/name the newest commit is taken that is in the cache" in capsys.readouterr().err


def test_a_commit_that_is_left_open_is_found_for_a_tokenizer_too(hub, folder):
    assert locate_tokenizer(ModelConfig(source="owner/name")) == folder
    assert hub == ["owner/name", ("owner/name", "1" * 40)]


@pytest.mark.parametrize("source", ["demo", "folder"])
def test_what_is_no_repository_has_no_commit(source, hub, folder):
    config = ModelConfig(source=str(folder) if source == "folder" else source)
    assert pinned(config) is config
    assert hub == []


def test_no_commit_is_looked_for_of_a_folder_that_is_not_there(hub):
    with pytest.raises(RecipeError, match=r"no such folder: \./nowhere"):
        pinned(ModelConfig(source="./nowhere"))
    assert hub == []


def test_a_hub_and_a_cache_without_the_repository(folder, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    message = refusal("owner/name")
    assert (
        "owner/name could not be fetched: the hub cannot be reached and no commit of it is in the local cache"
        in message
    )


def test_a_name_that_no_repository_can_have():
    assert "neither a folder nor the name of a hub repository" in refusal("owner/na me!", "main")


def locate_with_hub(tmp_path, **environment):
    code = (
        "from qlora_kit.core.errors import RecipeError\n"
        "from qlora_kit.model.source import locate_base\nfrom qlora_kit.schema.model import ModelConfig\n"
        "try:\n    print(locate_base(ModelConfig(source='owner/name', revision='0' * 40)))\n"
        "except RecipeError as error:\n    print(error)\n"
    )
    # Whether the hub is to be asked is up to each test, and libraries that other tests import set caches of their own.
    of_hub = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE")
    mine = {key: value for key, value in os.environ.items() if not key.startswith(of_hub)}
    everything = {**mine, "HF_HOME": str(tmp_path / "hub"), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "down"]
)
def test_a_hub_that_cannot_be_reached(tmp_path, environment):
    said = locate_with_hub(tmp_path, **environment)
    assert "owner/name could not be fetched: the hub cannot be reached and 0000" in said
    assert "do       model.source=<folder of a model in Hugging Face format>" in said


@pytest.mark.slow
def test_a_repository_in_the_hub_cache_needs_no_network(tmp_path, folder):
    place = tmp_path / "hub" / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    assert locate_with_hub(tmp_path, HF_HUB_OFFLINE="1").strip() == str(place)


def test_nothing_that_could_run_is_fetched():
    wide = [pattern for pattern in HUB_FILES if pattern.endswith((".py", ".bin", ".pt", ".pth", ".ckpt", "*"))]
    assert wide == ["LICENSE*", "NOTICE*", "USE_POLICY*"]
    assert "*.safetensors" in HUB_FILES


def test_a_tokenizer_is_found_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert locate_tokenizer(ModelConfig(source=str(folder))) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="has no tokenizer"):
        locate_tokenizer(ModelConfig(source=str(folder)))


def test_a_fetched_tokenizer_does_not_pass_for_the_model(folder, monkeypatch, capsys):
    """The hub's library serves a revision from its cache as soon as one file of it is there."""
    import huggingface_hub

    calls = []

    def snapshot(repository, *, revision, allow_patterns, ignore_patterns, local_files_only):
        calls.append(local_files_only)
        if "*.safetensors" in allow_patterns and not local_files_only:
            (folder / "model.safetensors").touch()
        return str(folder)

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = ModelConfig(source="owner/name", revision="0" * 40)
    assert locate_tokenizer(config) == folder
    assert calls == [True]
    assert not (folder / "model.safetensors").exists()
    assert locate_base(config) == folder
    assert calls == [True, True, False]
    assert "base model: fetching owner/name at 0000" in capsys.readouterr().err
    assert locate_base(config) == folder
    assert calls[3:] == [True]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("demo", ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        ("owner/model", ("owner/model", "abc")),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/0a1b", ("Qwen/Qwen3-4B", "0a1b")),
        ("/home/me/models/mine", None),
        ("./models", None),
        ("~/x", None),
        ("models", None),
    ],
)
def test_the_hubs_name_of_a_base(source, found):
    assert hub_name(source, "abc") == found


def test_a_folder_that_reads_like_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/model") is None
