"""A recipe as parameters: every field by its path, values that services can compare, and no secrets."""

from qlora_kit.core.secrets import masked
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.tracking.parameters import nested, parameters_of


def test_every_field_has_its_path():
    recipe = TrainRecipe(lora=LoraConfig(r=24, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 8}))
    found = parameters_of(recipe)
    assert found["lora.r"] == 24
    assert found["lora.targets"] == "q_proj,v_proj"
    assert found["lora.rank_pattern"] == "q_proj=8"
    assert found["optim.learning_rate"] == recipe.optim.learning_rate
    assert found["quant.kind"] == "nf4"
    assert found["lora.use_dora"] is False
    assert not any(path.startswith("tracker.") for path in found)
    assert nested(found)["lora"]["r"] == 24


def test_secrets_of_the_environment_are_masked(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    recipe = TrainRecipe(model=ModelConfig(source="/models/abcdefgh12345"), data=DataConfig(train_file="false.jsonl"))
    found = parameters_of(recipe)
    assert found["model.source"] == "/models/***"
    assert found["data.train_file"] == "false.jsonl"


def test_assigned_secrets_and_users_of_addresses_are_masked():
    assert masked("+hydra.job.env_set.HF_TOKEN=hf_abc data.max_tokens=512") == (
        "+hydra.job.env_set.HF_TOKEN=*** data.max_tokens=512"
    )
    assert masked("sqlite at https://me:pass@host/x") == "sqlite at https://***@host/x"
    assert masked("data.max_tokens=1024") == "data.max_tokens=1024"
