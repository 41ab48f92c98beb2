"""
Folders in the Hugging Face format: LLaMA 2 to 3.x, TinyLlama, SmolLM2, Qwen2, Qwen2.5, Qwen3.

    config.py          config.json -> a GPTConfig, and under which mask the model was trained
    tokenizer.py       tokenizer.json or vocab.json, and the chat template -> a Tokenizer
    chat_template.py   what a chat template writes around messages
    weights.py         safetensors -> a GPT, and back
"""
from data.hf.config import read_config, read_mask
from data.hf.tokenizer import load_tokenizer
from data.hf.weights import WEIGHTS, copy_small_files, from_pretrained, save_pretrained

__all__ = ["WEIGHTS", "copy_small_files", "from_pretrained", "load_tokenizer", "read_config",
           "read_mask", "save_pretrained"]
