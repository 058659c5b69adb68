"""LLaVA's projector as transformers names it, and our `projector` of two layers."""

NAMES = {
    f"{ours}.{kind}": f"model.multi_modal_projector.{theirs}.{kind}"
    for ours, theirs in {"layers.0": "linear_1", "layers.2": "linear_2"}.items()
    for kind in ("weight", "bias")
}
"""Our tensor -> that of a LlavaForConditionalGeneration."""
