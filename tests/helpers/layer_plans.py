"""Plans for one layer of a few tokens, by what they do with what is let go."""

from distrain.planners.activation_plan import LayerPlan, Split, snap

NUM_TOKENS = 256
WAYS = {
    "memo": LayerPlan.of(snap(NUM_TOKENS, swap=0.5)),
    "all again": LayerPlan.of(Split(recompute=NUM_TOKENS)),
    "swap": LayerPlan.of(Split(swap=NUM_TOKENS)),
}
