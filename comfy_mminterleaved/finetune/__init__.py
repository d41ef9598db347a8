"""Fine-tuning on stories of one's own, by LoRA: `finetune` trains, `pipeline.load_lora` applies what it writes."""

from .dataset import Panel, load_stories, story_panels
from .train import FinetuneConfig, finetune

__all__ = ["FinetuneConfig", "Panel", "finetune", "load_stories", "story_panels"]
