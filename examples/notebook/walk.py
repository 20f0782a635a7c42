# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From rollouts to spans to a trained policy
#
# The stages of TRACE, one cell each, on a policy of 1 M parameters that adds numbers step by step.
# Names and values are those of the command line: `to.run("annotate", {...})` is
# `trace-opd annotate`. Every result is a dataset in a store. A cell that runs again finds it.

# %%
import polars as pl
from transformers import AutoModelForCausalLM

import trace_opd as to

store = to.Store("runs/notebook")
policy = {"path": "micro"}
prompt = {"student": "{problem}", "teacher": "{problem}\nhint: {diagnostic_type}"}
sampling = {"temperature": 1.0, "max_new_tokens": 96}

# %% [markdown]
# ## Problems, and the policy's responses

# %%
digits = {"kind": "arithmetic", "min_digits": 3, "max_digits": 5}
problems = to.run("problems", {"source": digits, "limit": 48}, store=store)
held_out = to.run(
    "problems",
    {"source": digits, "limit": 32, "seed": 1, "split": "test"},
    store=store,
    alias="held-out",
)
rollouts = to.run(
    "rollout",
    {"problems": problems, "policy": policy, "prompt": prompt, "sampling": sampling},
    store=store,
)
rollouts

# %% [markdown]
# A dataset is Parquet with a documented schema: `to_polars` reads it.

# %%
verdicts = to.run("verify", {"rollouts": rollouts}, store=store)
verdicts.to_polars().group_by("correct").len()

# %% [markdown]
# ## Key spans and error spans
#
# The annotator marks segments of each response and gives it one type. Here it is an exact rule,
# which knows the problem's steps. A model at an endpoint is `{"engine": "openai", "model": …}`.

# %%
annotator = {"engine": "rule", "match": "line"}
annotations = to.run("annotate", {"verdicts": verdicts, "annotator": annotator}, store=store)
spans = annotations.to_polars().explode("spans").unnest("spans", separator="_")
(
    spans.drop_nulls("spans_kind")
    .group_by("diagnostic_type", "spans_kind")
    .agg(pl.len().alias("spans"), pl.col("spans_text").first().alias("for example"))
    .sort("spans", descending=True)
)

# %%
wrong = annotations.to_polars().filter(~pl.col("correct"))["rollout_id"][0]
to.show(annotations, wrong)

# %% [markdown]
# ## Routes
#
# Key spans of correct responses are routed to the forward KL divergence, up to a quarter of a
# response's tokens. The other tokens are trained with GRPO.

# %%
routing = {"alpha": 0.25, "key": "fkl", "error": "none"}
routed = to.run(
    "convert", {"annotations": annotations, "policy": policy, "routing": routing}, store=store
)
to.show(routed, 0)

# %% [markdown]
# ## Training
#
# Offline steps read the routed table. Online steps sample, judge, annotate and route with the
# current weights.

# %%
trained = to.run(
    "train",
    {
        "policy": policy,
        "prompt": prompt,
        "offline": {"routed": routed, "steps": 4},
        "online": {
            "problems": problems,
            "steps": 8,
            "group_size": 8,
            "sampling": sampling,
            "annotator": annotator,
            "routing": routing,
        },
        "optim": {"lr": 1e-4},
        "groups_per_step": 8,
        "micro_batch_tokens": 4096,
    },
    store=store,
)
trained

# %%
evaluation = to.run(
    "evaluate",
    {
        "problems": held_out,
        "policy": policy,
        "trained": trained,
        "prompt": prompt,
        "sampling": sampling,
        "k": 4,
    },
    store=store,
)
evaluation

# %% [markdown]
# The trained policy is a model folder.

# %%
folder = trained.path(trained.summary["checkpoint"])
model = AutoModelForCausalLM.from_pretrained(folder)
model.num_parameters()
