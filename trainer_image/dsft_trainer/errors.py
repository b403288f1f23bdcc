"""The trainer's one error: a failure class, what happened, and what to do about it."""

from dsft_api.conditions import ExitCode, FailureClass


class TrainerError(Exception):
    """Ends the attempt with the class's exit code.

    `message` says what happened to what (file, field, value); `remedy` what to do, by default that of the class.
    """

    def __init__(self, failure_class: FailureClass, message: str, remedy: str | None = None) -> None:
        super().__init__(failure_class, message, remedy)
        self.failure_class = failure_class
        self.message = message
        self.remedy = remedy or failure_class.failure.remedy

    @property
    def exit_code(self) -> ExitCode:
        return self.failure_class.failure.exit_code

    def __str__(self) -> str:
        return f"{self.failure_class}: {self.message} ({self.remedy})"
