"""What a site leaves at the end of a run: models in its own folder, and the small files beside them at the server."""

from fl_adapters.participant.results.end_of_run import Results
from fl_adapters.participant.results.model_files import Export, ModelFiles

__all__ = ["Export", "ModelFiles", "Results"]
