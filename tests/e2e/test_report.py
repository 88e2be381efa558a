"""A tiny run's page, as a user asks for it."""

import pytest

from tests.e2e.conftest import kit, only_run, train_line

pytestmark = pytest.mark.slow


def test_a_trained_run_has_a_page(workshop, tmp_path):
    trained = kit(tmp_path, *train_line(workshop, "trainer.max_steps=4", "trainer.eval_every_steps=2"))
    assert trained.returncode == 0, trained.stderr
    done = kit(tmp_path, "report")
    assert done.returncode == 0, done.stderr
    page = only_run(tmp_path) / "report.html"
    assert done.stdout == f"page: {page.relative_to(tmp_path)}\n"
    html = page.read_text()
    for part in ("step 4: training loss", "step 2: held-out loss", "step 4: held-out loss", "No file to serve"):
        assert part in html
