"""`qlora-kit plan`: what a recipe needs, before a weight is loaded."""

from dataclasses import replace

from qlora_kit.cli.line import looking_verb_help, parse_line
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.schema.check_wished import EXPORTS

HELP = """usage: qlora-kit plan [group=option] [path=value] [card=24GB]

Prints memory by part and the number of steps of a training recipe; loads no weight. With card= it is planned for a GPU
that is not at hand, by its size or its name; where it does not fit, lines that do are printed.

Examples:
  qlora-kit plan experiment=llama3_1_8b_chat_24gb data.train_file=chats.jsonl
  qlora-kit plan experiment=llama3_1_8b_chat_24gb data.train_file=chats.jsonl trainer.batch_size=8 lora.r=64
  qlora-kit plan experiment=llama3_1_8b_chat_24gb data.train_file=chats.jsonl card=rtx_4090"""
CARD = "card"


def run(arguments: list[str]) -> int:
    """Print the plan; returns the exit code."""
    line = parse_line(arguments)
    if line.wants_help:
        print(looking_verb_help(HELP))
        return EXIT_OK
    from qlora_kit.core.console.safe import SafeConsole
    from qlora_kit.memory.card import card_of
    from qlora_kit.pipelines.plan import known_base, known_rows, plan, with_planned_engine
    from qlora_kit.schema.check import check_settings
    from qlora_kit.schema.compose import training_unchecked

    asked = line.value(CARD)
    words = [word for word in line.overrides if word.split("=", 1)[0] != CARD]
    card = None if asked is None else card_of(asked)
    composed = training_unchecked(words)
    recipe = composed.recipe
    if issues := check_settings(recipe):
        raise RecipeError([composed.problem(issue) for issue in issues])
    recipe, lines = with_planned_engine(recipe, card)
    base = known_base(recipe, composed.origins[EXPORTS])
    base = replace(base, notes=(*lines, *base.notes))
    text = plan(recipe, base, known_rows(recipe, card), card, line.overrides)
    SafeConsole().print(text, soft_wrap=True)  # lines to paste are one line each
    return EXIT_OK
