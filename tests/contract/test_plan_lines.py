"""Lines that a plan prints keep their brackets, whatever stands in them."""

import shlex

from qlora_kit.cli.verbs import main
from tests.tiny_models import build_tiny_model


def test_lists_and_names_with_brackets_come_out_as_they_went_in(tmp_path, capsys):
    folder = build_tiny_model("llama", tmp_path / "q[/x]")
    words = [f'model.source="{folder}"', "data=messages", "data.max_tokens=900", "trainer=cpu", "trainer.batch_size=64"]
    words += ["exports=[gguf_q8_0]", "lora.targets=[q_proj,v_proj]", "card=0.6GB"]
    assert main(["plan", *words]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("qlora-kit plan")]
    assert lines
    for line in lines:
        told = shlex.split(line)
        assert {"exports=[gguf_q8_0]", "lora.targets=[q_proj,v_proj]"} <= set(told)
        assert main(told[1:]) == 0, line
