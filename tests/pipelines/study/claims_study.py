"""A small study of claims, for the tests of claims: a map of two axes and a line."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
START = str(ROOT / "studies" / "micro-bases" / "step-800")
WORLD = {"start": START, "steps": 2, "batch_size": 4, "min_digits": 2, "max_digits": 2}
ADDITIONS = {"kind": "arithmetic", "min_digits": 2, "max_digits": 2}
CARRIES = {
    "label": "share of dropped carries",
    "points": {"25 %": ["world.dropped_carry=0.25"], "50 %": ["world.dropped_carry=0.5"]},
}
ARMS = {"grpo": {"preset": "grpo"}, "fkl": {"preset": "trace-fkl", "set": ["optim.lr=1.0e-3"]}}
MAP = {
    "title": "a. Starved: FKL beats GRPO, by far",
    "about": "What *this* tests.",
    "world": WORLD,
    "x": CARRIES,
    "y": {
        "label": "rollouts a step",
        "points": {"2 × 4": ["train.groups_per_step=2"], "1 × 4": ["train.groups_per_step=1"]},
    },
    "arms": ARMS,
    "comparisons": [
        {"higher": "fkl", "lower": "grpo"},
        {"higher": "grpo", "lower": "fkl", "of": "tokens"},
        {"higher": "grpo", "lower": "fkl", "of": "other"},
    ],
    "seeds": 1,
}
# At its points the runs of the first seed are those of the map's first row.
LINE = {
    "title": "h. Lift",
    "world": WORLD,
    "x": CARRIES,
    "arms": ARMS,
    "comparisons": [
        {"higher": "fkl", "lower": "grpo", "of": "lift"},
        {"higher": "grpo", "lower": "fkl", "of": "entropy"},
    ],
    "one_step": "fkl",
    "seeds": 1,
}
STUDY = {
    "name": "small",
    "problems": {"source": ADDITIONS, "limit": 8},
    "splits": {
        "test": {"source": ADDITIONS, "limit": 6, "seed": 1},
        "other": {"source": ADDITIONS, "limit": 4, "seed": 2},
    },
    "seeds": [3, 4],
    "train": {
        "prompt": {"student": "{problem}", "teacher": "{problem}\nhint: {diagnostic_type}"},
        "online": {
            "steps": 1,
            "group_size": 4,
            "sampling": {"max_new_tokens": 40},
            "annotator": {"engine": "rule", "match": "line"},
        },
        "optim": {"lr": 1e-4},
        "groups_per_step": 2,
        "tracker": "none",
        "validation": {"every": 1, "k": 2, "greedy": False},
    },
    "claims": {"map": MAP, "line": LINE},
    "bootstrap": 100,
    "workers": 1,
    "quick": ["claims.map.y=null", "seeds=[3]"],
}
