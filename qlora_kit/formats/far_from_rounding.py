"""Finds files that are far worse than RTN, plain rounding to as many bits: with those bits it was not the bits."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.evaluation.reference import Reference
from qlora_kit.evaluation.rounded_twin import score_rounded_twin
from qlora_kit.evaluation.scores import Fidelity
from qlora_kit.formats.job import ExportJob
from qlora_kit.formats.registry import find_format

SUSPICIOUS_KL = 0.1  # nats; below, no twin is made
FAR = 2.0  # times the twin's KL
LEAST_BITS = 3  # with fewer, RTN is worth nothing itself
SIXTEEN = 16  # the twin is the 16-bit model as it is: a file of another layout may compute something else


def far_from_rounding(
    job: ExportJob, fidelity: Fidelity, merged: Path, reference: Reference, pad_token_id: int
) -> Iterator[str]:
    """A fault where a file's KL lies clearly above twice that of the rounded 16-bit model, on the same rows.

    Args:
        merged: the 16-bit folder that the file was made from.
    """
    bits, interval = weight_bits(job.format, job.settings), fidelity.mean_kl_interval
    if bits is None or interval is None or interval[0] <= SUSPICIOUS_KL:
        return
    key = str(merged), bits
    if key not in reference.twins:
        log.info(f"{job.name}: mean KL {fidelity.mean_kl:.4f}; scoring the RTN baseline of {bits} bits")
        try:
            twin = score_rounded_twin(merged, bits, reference.rows, reference.scores, pad_token_id)
        except (RuntimeError, OSError) as error:
            log.warning(f"{job.name}: the RTN baseline could not be scored: {str(error).splitlines()[0]}")
            return
        reference.twins[key] = twin.mean_kl
    if interval[0] > FAR * reference.twins[key]:
        twin_is = f"the RTN baseline, the same weights rounded to the nearest of {bits} bits"
        if bits == SIXTEEN:
            twin_is = "the 16-bit folder that it was made from: the file computes something else"
        yield f"mean KL {fidelity.mean_kl:.4f} is more than twice the {reference.twins[key]:.4f} of {twin_is}"


def weight_bits(format_name: str, settings: Mapping[str, object]) -> int | None:
    """Whole bits of a weight; None where RTN is no baseline: few bits, or layers that differ."""
    if settings.get("overrides") or settings.get("bits_budget"):
        return None
    bits = find_format(format_name).weight_bits(settings)
    return bits if bits is not None and (LEAST_BITS <= bits <= 8 or bits == SIXTEEN) else None
