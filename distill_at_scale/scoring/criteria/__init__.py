"""What makes a sample useful: one file per criterion, and this table of them."""

from distill_at_scale.scoring.criteria.loss import Loss

CRITERIA = {
    "loss": Loss,
}
