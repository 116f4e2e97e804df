"""Opening a teacher behind a server: the run starts the server or finds it, and checks it against the student."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from ..distill.config import ExactConfig, TopKConfig
from ..distill.served_teacher import ServedTeacher
from ..distill.teacher import TeacherError, check_same_language, check_same_patches, check_same_pixels
from ..distill.teacher_client import TeacherClient
from ..distill.teacher_server import ServedModel, teacher_server
from ..model.engine_server import EngineServer
from ..model.layout import Ranks, machine_dtype
from ..model.token_client import Endpoint
from .build import LoadedModel, Workshop
from .run_log import RunLog
from .schema import OnPolicyDistillRecipe, TeacherConfig, TeacherServeConfig
from .training import phase_of

_MOST_LOGPROBS = 20
"""What vLLM's server allows by default; ours allows as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOpening:
    """What opening a teacher needs; what has to be closed is left to `stack`."""

    recipe: OnPolicyDistillRecipe
    workshop: Workshop
    log: RunLog
    ranks: Ranks
    is_stopping: Callable[[], bool]
    stack: ExitStack

    def say(self, text: str) -> None:
        """Prints a line under the stage's name."""
        self.log.say(f"{phase_of(self.recipe)}: {text}")

    def open(self, name: str, config: TeacherConfig, student: LoadedModel) -> ServedTeacher:
        """Returns the teacher, checked against the student's tokens and, where its folder is known, against its images; a collective."""
        support = self.recipe.distill.support
        assert not isinstance(support, ExactConfig), "the recipe refuses it"

        def heed(what: str) -> None:
            self.say(f"teacher {name}: {what}")
            self.log.event("teacher", phase=phase_of(self.recipe), name=name, what=what)

        server: EngineServer | None = None
        if config.serve is None:
            endpoint, source = self._found(name, config), f"{config.served_as} at {config.url}"
        else:
            source = self.workshop.source(config.serve.model, seed=self.recipe.seed)
            self._check_alike(name, config.serve, source, student)
            endpoint, server = self._started(name, config.serve, source, heed)
        client = TeacherClient(
            endpoint,
            name=name,
            config=config.requests,
            heed=heed,
            fault=lambda: None if server is None else server.fault,
            is_stopping=self.is_stopping,
        )
        teacher = ServedTeacher(client, chat=student.chat, support=support, ranks=self.ranks, tasks=config.tasks)
        teacher.check(student.chat)
        self.say(f"teacher {name}: {source}, served at {endpoint.url}, {', '.join(config.tasks) or 'all other tasks'}")
        return teacher

    def _found(self, name: str, config: TeacherConfig) -> Endpoint:
        key = None if config.api_key_env is None else os.environ.get(config.api_key_env)
        if config.api_key_env is not None and not key:
            raise TeacherError(f"teacher {name}: the environment has no {config.api_key_env} (api_key_env): set it to the server's key")
        assert config.url is not None, "the settings check it"
        assert config.served_as is not None, "the settings check it"
        return Endpoint(url=config.url, model=config.served_as, api_key=key)

    def _check_alike(self, name: str, config: TeacherServeConfig, source: str, student: LoadedModel) -> None:
        chat = self.workshop.load_chat(config.model, seed=self.recipe.seed)
        check_same_language(student.chat, chat, name=name)
        check_same_pixels(student.chat, chat, name=name)
        check_same_patches(student.model.config, AutoConfig.from_pretrained(source, trust_remote_code=False), name=name)

    def _started(
        self, name: str, config: TeacherServeConfig, source: str, heed: Callable[[str], None]
    ) -> tuple[Endpoint, EngineServer | None]:
        """Returns where the server answers, which the first rank starts and watches; where it does not start, all ranks raise."""
        recipe, support = self.recipe, self.recipe.distill.support
        images = recipe.sampler.max_images_per_prompt if recipe.distill.prompts == "multimodal" else 0
        model = ServedModel(
            source=source,
            dtype="bfloat16" if machine_dtype(config.dtype) == torch.bfloat16 else "float32",
            max_model_len=recipe.sampler.max_model_len + 1 if config.max_model_len is None else config.max_model_len,
            max_images_per_prompt=images if config.max_images_per_prompt is None else config.max_images_per_prompt,
            # The drawn token is asked for beside the student's ids.
            max_logprobs=max(_MOST_LOGPROBS, support.k + 1 if isinstance(support, TopKConfig) else 0),
        )
        server: EngineServer | None = None
        told: Endpoint | str | None = None
        if self.ranks.is_first:
            log_file = recipe.output / f"teacher-{name}.log"
            self.say(f"teacher {name}: starting its server, see {log_file}")
            try:
                server = self.stack.enter_context(teacher_server(config, model, name=name, log_file=log_file, heed=heed))
                told = server.endpoint
            except TeacherError as error:
                told = str(error)
        told = self.ranks.gather(told)[0]
        if isinstance(told, str):
            raise TeacherError(told)
        assert told is not None, "the first rank has one or the other"
        return told, server
