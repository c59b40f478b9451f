"""sawkv in Hugging Face Transformers: `SawCache`, and an attention function named `sawkv` that reads its pages. See
docs/transformers.md.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sawkv")  # after this package was imported
    model.generate(**inputs, past_key_values=SawCache(model))

Importing this package registers the attention function through Transformers' own `AttentionInterface`. Nothing of
Transformers is patched.
"""

from sawkv.integrations.transformers.attention import register
from sawkv.integrations.transformers.cache import SawCache

__all__ = ["SawCache"]

register()
