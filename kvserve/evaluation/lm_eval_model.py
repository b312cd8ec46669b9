# SPDX-License-Identifier: Apache-2.0
"""The model ``kvserve`` of lm-evaluation-harness, and its command with it.

    python -m kvserve.evaluation.lm_eval_model run --model kvserve \\
        --model_args base_url=http://127.0.0.1:8000,held=32 --tasks arc_easy

Needs ``lm_eval`` beside kvserve, and a server with the logits processor that forces.
"""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from kvserve.errors import UserError
from kvserve.evaluation.log_likelihood import Score, Scorer
from kvserve.evaluation.remote import call


class ForcedModel(LM):  # type: ignore[misc]
    """Scores continuations by forcing them, see :class:`Scorer`.

    Args:
        base_url: of the server.
        held, num_concurrent: as :class:`Scorer` has ``held`` and ``at_once``.
        others: what the harness gives every model; a server decides on these itself.
    """

    def __init__(
        self, base_url: str, held: int = 1, num_concurrent: int = 8, **others: Any
    ) -> None:
        super().__init__()
        unknown = others.keys() - {"batch_size", "max_batch_size", "device"}
        if unknown:
            raise UserError(f"--model_args {sorted(unknown)[0]}: no such argument")
        self._scorer = Scorer(base_url, int(held), int(num_concurrent))

    def loglikelihood(self, requests: list[Any]) -> list[Score]:
        return self._scorer.scores([one.args for one in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Score whole texts but for their first token, which begins the prompt."""
        pairs = [("", one.args[0]) for one in requests]
        return [score for score, _ in self._scorer.scores(pairs)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self._generate(*one.args) for one in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        server = self._scorer.server
        body = {
            "model": server.model,
            "prompt": context,
            "max_tokens": options.get("max_gen_toks", 256),
            "temperature": options.get("temperature", 0),
            "stop": [until] if isinstance(until, str) else until,
        }
        (choice,) = call(server.url, "POST", "/v1/completions", body)["choices"]
        text: str = choice["text"]
        return text


register_model("kvserve")(ForcedModel)


def main() -> int:
    """Run lm-evaluation-harness as ``lm_eval`` does."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"kvserve: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
