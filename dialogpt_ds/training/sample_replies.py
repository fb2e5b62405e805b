"""What the model answers to the same prompts as training goes on."""

from dialogpt_ds.logs.record import Reply
from dialogpt_ds.replies.generate import replies, turns_of
from dialogpt_ds.training.engine import Engine
from dialogpt_ds.training.settings import Settings


class SampleReplies:
    """Asks the model under training. The same weights give the same replies: the seed is the run's."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self.prompts = settings.sample_prompts if engine.module.model.can_generate() else []
        self.together = settings.zero_stage == 3
        """Each rank holds a part of every weight, so all compute; else rank 0 has all of them and the others go on."""

    def replies(self) -> tuple[list[Reply], str]:
        """Return rank 0's replies, and a warning where there will be none any more. Collective: every rank must
        call."""
        if not self.prompts or not (self.together or self.settings.world.is_first):
            return [], ""
        arguments = self.settings.arguments
        conversations = [turns_of(prompt) for prompt in self.prompts]
        model, tokenizer = self.engine.module.model, self.settings.tokenizer
        try:
            answers = replies(
                model,
                tokenizer,
                conversations,
                arguments.seed,
                arguments.sample_max_new_tokens,
                self.together,
                self.engine.device,
            )
        except Exception as error:  # of a model that can't generate, or for want of memory; training needs none of it
            if self.together and self.settings.world.size > 1:
                raise  # the others wait in a collective, so there is no going on
            prompts, self.prompts = self.prompts, []
            return [], f"warning: no replies to the {len(prompts)} sample prompts from here on: {error!r}"
        return [Reply(prompt, answer) for prompt, answer in zip(self.prompts, answers, strict=True)], ""
