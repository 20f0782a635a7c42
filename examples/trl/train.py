"""TRL's GRPO trainer with routed tokens, on the micro policy: python examples/trl/train.py"""

from trl import GRPOConfig

from trace_opd.data.store import Store
from trace_opd.integrations.trl import RoutedGRPOTrainer, RoutedSettings, trl_dataset
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.schemas.configs import ProblemsConfig
from trace_opd.schemas.settings import load_config

store = Store("runs/trl/store")
source = "source={kind: arithmetic, min_digits: 3, max_digits: 5}"
problems = run_stage(
    "problems", load_config(ProblemsConfig, None, [source, "limit=64"], None), store
)

routed = RoutedSettings.model_validate(
    {
        "annotator": {"engine": "rule"},
        "prompt": {"teacher": "{problem}\nhint: {diagnostic_type}"},
        "schedule": {"w0": 0.5, "hold_steps": 2, "decay_steps": 4},
        "teacher": {"sync": "periodic", "sync_steps": 2},
    }
)
args = GRPOConfig(
    output_dir="runs/trl/model",
    max_steps=8,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=4,
    num_generations=8,
    max_completion_length=96,
    learning_rate=1e-4,
    logging_steps=1,
    bf16=False,
    report_to=[],
    model_init_kwargs={"dtype": "float32"},
)
dataset = trl_dataset(problems.read(), routed.prompt)
with RoutedGRPOTrainer(resolve_policy("micro"), routed, args, dataset) as trainer:
    trainer.train()
    trainer.save_model()
