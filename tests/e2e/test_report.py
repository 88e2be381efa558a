"""A tiny run's page, as a user asks for it."""

import pytest

from tests.e2e.conftest import cold_kit, kit, only_run, train_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    done = kit(folder, *train_line(workshop, "trainer.max_steps=4", "trainer.eval_every_steps=2"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_trained_run_has_a_page(trained):
    done = cold_kit(trained, "report")
    assert done.returncode == 0, done.stderr
    page = only_run(trained) / "report.html"
    assert done.stdout == f"page: {page.relative_to(trained)}\n"
    html = page.read_text()
    for part in ("step 4: training loss", "step 2: held-out loss", "step 4: held-out loss", "No file to serve"):
        assert part in html
    assert 'id="bases"' not in html
    assert 'id="survival"' not in html


def test_the_page_shows_bases_and_what_is_left_of_the_update(trained):
    """From manifests as export writes them."""
    line = ["export", "run=latest", "export=gguf_q8_0", "export.merge_base=best", "export.score_rows=2"]
    exported = kit(trained, *line)
    assert exported.returncode == 0, exported.stderr
    done = kit(trained, "report")
    assert done.returncode == 0, done.stderr
    html = (only_run(trained) / "report.html").read_text()
    bases = html.partition('id="bases"')[2].partition("</section>")[0]
    assert "dequantized" in bases
    assert "original" in bases
    assert bases.count("taken") == 1
    survival = html.partition('id="survival"')[2].partition("</section>")[0]
    assert "<td><b>gguf_q8_0</b></td>" in survival
    assert "No file to serve" not in html
