"""Write a short prompt out into a detailed one, with any chat model of transformers."""

from typing import Any

import torch

from flowcache.errors import UserError, first_line

INSTRUCTION = (
    "You write prompts for a text-to-video model. Rewrite the user's idea as one English paragraph "
    "of 60 to 120 words. Keep every subject, action and style that the user names; add plausible "
    "looks, motion, surroundings, light and camera. Describe only what can be seen. Answer with "
    "the paragraph alone."
)
MAX_NEW_TOKENS = 400
"""Enough for the longest paragraph that is asked for; the video model reads 512 tokens."""


@torch.no_grad()
def enhance(prompt: str, *, model: str, device: torch.device) -> str:
    """Return a detailed prompt; the same input always gives the same text (greedy decoding).

    Args:
        prompt: a short description of the video.
        model: folder or hub id of a chat model; it is loaded as stored and dropped afterwards.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import

    try:
        # Any: transformers types its methods as untyped wrappers
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        writer: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"prompt enhancer {model}: cannot be loaded ({first_line(error)}); give the folder or "
            "hub id of a chat model as --prompt_enhancer_model"
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"prompt enhancer {model}: is no chat model, its tokenizer has no chat template"
        )
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(device)
    written = writer.to(device).generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answer = written[0, asked["input_ids"].shape[1] :]
    text = " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())
    if not text:
        raise UserError(f"prompt enhancer {model}: answered nothing; use another model")
    return text
