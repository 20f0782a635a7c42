"""A greedy sampler with transformers. The manual: OwnSampler in pipelines/samplers/own.py.

It returns token ids and log-probabilities, so its rollouts can be trained on, and it has `follow`,
so it can sample while a policy is trained.
"""

import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.trace.policy import load_policy
from trace_opd.trace.protocols import Completion


class Greedy:
    def __init__(self, policy) -> None:
        self.path, self.loaded = policy.path, None

    def follow(self, policy, probe) -> None:
        """In training: a copy gets the weights of the step."""
        self.own().model.load_state_dict(dict(policy.weights()))

    @torch.no_grad()
    def sample(self, prompts, sampling, seeds):
        pairs = zip(prompts, seeds, strict=True)
        return [[self.one(prompt, sampling)] * len(own) for prompt, own in pairs]

    def own(self):
        if self.loaded is None:
            self.loaded = load_policy(resolve_policy(self.path), "cpu", "float32")
        return self.loaded

    def one(self, prompt, sampling) -> Completion:
        model, end = self.own().model, self.own().tokenizer.eos_token_id
        ids, logprobs = list(prompt.token_ids), []
        while len(logprobs) < sampling.max_new_tokens:
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            if ids[-1] == end:
                break
        own = ids[len(prompt.token_ids) :]
        reason = "stop" if own[-1] == end else "length"
        # The engine decodes the text from the token ids.
        return Completion("", reason, own, logprobs, prompt.token_ids)
