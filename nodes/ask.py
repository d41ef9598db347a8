"""Ask About Story, Caption Image, Rank Answers: what the LLM sees in images."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.generation.config import TextGenerationConfig
from ..comfy_mminterleaved.generation.decoding import MAX_OPTIONS
from ..comfy_mminterleaved.stories.story import Story
from .blocks import progress
from .segments import encode_story, images_from_batch
from .types import CATEGORY, EncoderSocket, LLMSocket, StorySocket, search_aliases, writer_input
from .write import progress_callback, require_llm, text_callback


class AskAboutStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedAsk",
            **search_aliases("Ask"),
            display_name="Ask About Story",
            category=CATEGORY,
            description="Answers a question about the images of a story.",
            is_output_node=True,
            inputs=[
                LLMSocket.Input(
                    "llm", optional=True, tooltip="Reads the story and answers; a writer can do it instead."
                ),
                StorySocket.Input("story", tooltip="A story with at least one image."),
                io.String.Input(
                    "question",
                    multiline=True,
                    default="Who is in the picture?",
                    dynamic_prompts=False,
                    tooltip="The starter model knows questions about who, where, what and the weather.",
                ),
                io.Int.Input("max_tokens", default=20, min=1, max=1024, tooltip="Longest answer, in tokens."),
                writer_input(),
            ],
            outputs=[io.String.Output("answer_out", display_name="answer")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story, question, max_tokens, llm=None, writer=None) -> io.NodeOutput:
        if not question.strip():
            raise StoryError("The question is empty; ask something.")
        if writer is not None:
            answer = writer.answer(story, question, max_tokens, text_callback(cls.hidden, max_tokens))
            return io.NodeOutput(answer, ui=ui.PreviewText(answer))
        require_llm(llm)
        config = TextGenerationConfig(
            max_new_tokens=max_tokens, min_new_tokens=1, do_sample=False, repetition_penalty=1.0
        )
        on_token = progress_callback(cls.hidden, max_tokens)
        story = llm.prepare(llm.generator.question_story(story, question), max_tokens)
        answer = llm.generator.generate_text(story, config, on_token).text
        return io.NodeOutput(answer, ui=ui.PreviewText(answer))


class CaptionImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedCaption",
            **search_aliases("Caption"),
            display_name="Caption Image",
            category=CATEGORY,
            description="Describes an image. A batch gives one caption per image.",
            is_output_node=True,
            inputs=[
                LLMSocket.Input("llm", optional=True, tooltip="Writes the caption; a writer can do it instead."),
                EncoderSocket.Input("encoder", optional=True, tooltip="Encodes the image; a writer needs none."),
                io.Image.Input("image", tooltip="An image, or a batch of images."),
                io.Int.Input(
                    "beams",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="Captions that the beam search keeps at a time; 1 always takes the likeliest word.",
                ),
                io.Int.Input("max_tokens", default=40, min=1, max=1024, tooltip="Longest caption, in tokens."),
                writer_input(),
            ],
            outputs=[io.String.Output("captions_out", display_name="captions", is_output_list=True)],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, image, beams, max_tokens, llm=None, encoder=None, writer=None) -> io.NodeOutput:
        if writer is not None:
            on_text = text_callback(cls.hidden, max_tokens)
            captions = [writer.caption(segment, max_tokens, on_text) for segment in images_from_batch(image)]
            return io.NodeOutput(captions, ui=ui.PreviewText("\n".join(captions)))
        require_llm(llm)
        config = TextGenerationConfig(
            max_new_tokens=max_tokens, min_new_tokens=1, repetition_penalty=1.0, num_beams=beams, do_sample=beams > 1
        )
        images = encode_story(encoder, Story.of(*images_from_batch(image))).images
        on_token = progress_callback(cls.hidden, max_tokens * len(images))
        captions = []
        for segment in images:
            story = llm.prepare(llm.generator.caption_story(Story.of(segment)), max_tokens, beams)
            captions.append(llm.generator.generate_text(story, config, on_token).text)
        return io.NodeOutput(captions, ui=ui.PreviewText("\n".join(captions)))


class RankAnswers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedChoose",
            **search_aliases("Choose"),
            display_name="Rank Answers",
            category=CATEGORY,
            description="Ranks answers by how likely they are, as the story's next text or as answers to a question.",
            is_output_node=True,
            inputs=[
                LLMSocket.Input(
                    "llm", optional=True, tooltip="Reads the story and scores the options; a writer can do it instead."
                ),
                StorySocket.Input("story", tooltip="The story that the options are about."),
                io.String.Input(
                    "options",
                    multiline=True,
                    default="a fox\na bear\na rabbit",
                    dynamic_prompts=False,
                    tooltip="One option per line.",
                ),
                io.String.Input("question", default="", tooltip="A question that the options answer; may be empty."),
                writer_input(),
            ],
            outputs=[
                io.String.Output("best_out", display_name="best", tooltip="The likeliest option."),
                io.String.Output("options_out", display_name="ranked", is_output_list=True, tooltip="Likeliest first."),
                io.Float.Output(
                    "scores_out",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="The log-probability of each, in the order of 'ranked'; 0, -1, -2, ... from a writer that gives none.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, story, options, question, llm=None, writer=None) -> io.NodeOutput:
        lines = [line.strip() for line in options.splitlines() if line.strip()]
        if len(lines) < 2:
            raise StoryError(f"There must be at least two options, one per line, not {len(lines)}.")
        if writer is not None:
            return cls._output(writer.rank(story, lines, question, text_callback(cls.hidden, 80)))
        require_llm(llm)
        if question.strip():
            story = llm.generator.question_story(story, question)
        longest = max(len(llm.generator.tokenize(Story.of(line))) for line in lines)
        story = llm.prepare(story, longest, min(len(lines), MAX_OPTIONS), are_given=True)
        return cls._output(llm.generator.rank(story, lines, on_progress=progress(len(lines))))

    @classmethod
    def _output(cls, ranked) -> io.NodeOutput:
        table = "\n".join(f"{option.log_prob:8.2f}  {option.text}" for option in ranked)
        return io.NodeOutput(
            ranked[0].text, [o.text for o in ranked], [o.log_prob for o in ranked], ui=ui.PreviewText(table)
        )
