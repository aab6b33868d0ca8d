from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "extra")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    extra: bool
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., extra: bool = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("layout", "manifest", "total_bytes", "digests", "inline", "file")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    layout: bytes
    manifest: Manifest
    total_bytes: int
    digests: bytes
    inline: bytes
    file: str
    def __init__(self, layout: _Optional[bytes] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., total_bytes: _Optional[int] = ..., digests: _Optional[bytes] = ..., inline: _Optional[bytes] = ..., file: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "features", "version", "job", "training", "follows", "settings")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    features: _containers.RepeatedScalarFieldContainer[str]
    version: str
    job: str
    training: int
    follows: str
    settings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., job: _Optional[str] = ..., training: _Optional[int] = ..., follows: _Optional[str] = ..., settings: _Optional[_Iterable[str]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("protocol", "features", "version", "attempt", "site", "index", "count", "settings_json", "started", "shared_folder", "training", "protocol_min", "protocol_max")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    SHARED_FOLDER_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    version: str
    attempt: int
    site: str
    index: int
    count: int
    settings_json: str
    started: bool
    shared_folder: str
    training: int
    protocol_min: int
    protocol_max: int
    def __init__(self, protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., attempt: _Optional[int] = ..., site: _Optional[str] = ..., index: _Optional[int] = ..., count: _Optional[int] = ..., settings_json: _Optional[str] = ..., started: bool = ..., shared_folder: _Optional[str] = ..., training: _Optional[int] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("job", "attempt", "beat_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BEAT_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    beat_s: float
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., beat_s: _Optional[float] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("session", "steps")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    steps: TrainingSteps
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., steps: _Optional[_Union[TrainingSteps, _Mapping]] = ...) -> None: ...

class TrainingSteps(_message.Message):
    __slots__ = ("round", "done", "total", "train_s")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    round: int
    done: int
    total: int
    train_s: float
    def __init__(self, round: _Optional[int] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., train_s: _Optional[float] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "error_json")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ERROR_JSON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    error_json: str
    def __init__(self, kind: _Optional[str] = ..., error_json: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("session", "manifest", "agreement", "info", "capabilities", "rounds", "evaluates", "terms_json", "names", "more", "excerpt", "min_cohort", "max_share", "own_model_stays", "stays")
    class AgreementEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class InfoEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_FIELD_NUMBER: _ClassVar[int]
    TERMS_JSON_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    EXCERPT_FIELD_NUMBER: _ClassVar[int]
    MIN_COHORT_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARE_FIELD_NUMBER: _ClassVar[int]
    OWN_MODEL_STAYS_FIELD_NUMBER: _ClassVar[int]
    STAYS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    manifest: Manifest
    agreement: _containers.ScalarMap[str, str]
    info: _containers.ScalarMap[str, str]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    rounds: int
    evaluates: bool
    terms_json: str
    names: _containers.RepeatedCompositeFieldContainer[NameList]
    more: bool
    excerpt: NameExcerpt
    min_cohort: int
    max_share: float
    own_model_stays: bool
    stays: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., agreement: _Optional[_Mapping[str, str]] = ..., info: _Optional[_Mapping[str, str]] = ..., capabilities: _Optional[_Iterable[str]] = ..., rounds: _Optional[int] = ..., evaluates: bool = ..., terms_json: _Optional[str] = ..., names: _Optional[_Iterable[_Union[NameList, _Mapping]]] = ..., more: bool = ..., excerpt: _Optional[_Union[NameExcerpt, _Mapping]] = ..., min_cohort: _Optional[int] = ..., max_share: _Optional[float] = ..., own_model_stays: bool = ..., stays: _Optional[_Iterable[str]] = ...) -> None: ...

class NameList(_message.Message):
    __slots__ = ("name", "count", "digest", "block", "block_digests", "entries", "from_data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    FROM_DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    count: int
    digest: bytes
    block: int
    block_digests: bytes
    entries: _containers.RepeatedScalarFieldContainer[str]
    from_data: bool
    def __init__(self, name: _Optional[str] = ..., count: _Optional[int] = ..., digest: _Optional[bytes] = ..., block: _Optional[int] = ..., block_digests: _Optional[bytes] = ..., entries: _Optional[_Iterable[str]] = ..., from_data: bool = ...) -> None: ...

class NameExcerpt(_message.Message):
    __slots__ = ("name", "start", "entries")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    start: int
    entries: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., start: _Optional[int] = ..., entries: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("rounds", "waiting", "question")
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    waiting: Waiting
    question: NameQuestion
    def __init__(self, rounds: _Optional[int] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., question: _Optional[_Union[NameQuestion, _Mapping]] = ...) -> None: ...

class NameQuestion(_message.Message):
    __slots__ = ("name", "start", "stop")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    name: str
    start: int
    stop: int
    def __init__(self, name: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class NextRequest(_message.Message):
    __slots__ = ("session", "layouts", "resume_from", "resume_round", "resume_digest", "best", "evaluate", "shared", "done", "held")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    RESUME_ROUND_FIELD_NUMBER: _ClassVar[int]
    RESUME_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    session: Session
    layouts: _containers.RepeatedScalarFieldContainer[bytes]
    resume_from: int
    resume_round: int
    resume_digest: bytes
    best: bool
    evaluate: bool
    shared: bool
    done: str
    held: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., layouts: _Optional[_Iterable[bytes]] = ..., resume_from: _Optional[int] = ..., resume_round: _Optional[int] = ..., resume_digest: _Optional[bytes] = ..., best: bool = ..., evaluate: bool = ..., shared: bool = ..., done: _Optional[str] = ..., held: _Optional[int] = ...) -> None: ...

class TaskHeader(_message.Message):
    __slots__ = ("job", "round", "stage", "kind", "version", "config_json", "payload", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    round: int
    stage: str
    kind: str
    version: int
    config_json: str
    payload: Payload
    offset: int
    def __init__(self, job: _Optional[str] = ..., round: _Optional[int] = ..., stage: _Optional[str] = ..., kind: _Optional[str] = ..., version: _Optional[int] = ..., config_json: _Optional[str] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("round", "why")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    round: int
    why: str
    def __init__(self, round: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class TaskPart(_message.Message):
    __slots__ = ("waiting", "task", "data")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    waiting: Waiting
    task: TaskHeader
    data: bytes
    def __init__(self, waiting: _Optional[_Union[Waiting, _Mapping]] = ..., task: _Optional[_Union[TaskHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("session", "round", "stage", "base_version", "content", "encoding", "num_examples", "local_steps", "metrics_json", "payload", "shared", "finite", "train_s", "waits")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    round: int
    stage: str
    base_version: int
    content: str
    encoding: str
    num_examples: int
    local_steps: int
    metrics_json: str
    payload: Payload
    shared: bool
    finite: bool
    train_s: float
    waits: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., round: _Optional[int] = ..., stage: _Optional[str] = ..., base_version: _Optional[int] = ..., content: _Optional[str] = ..., encoding: _Optional[str] = ..., num_examples: _Optional[int] = ..., local_steps: _Optional[int] = ..., metrics_json: _Optional[str] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., shared: bool = ..., finite: bool = ..., train_s: _Optional[float] = ..., waits: bool = ...) -> None: ...

class UpdatePart(_message.Message):
    __slots__ = ("update", "data")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    update: UpdateHeader
    data: bytes
    def __init__(self, update: _Optional[_Union[UpdateHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("send_from", "accepted", "waiting", "file", "frame_bytes")
    SEND_FROM_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    send_from: int
    accepted: Accepted
    waiting: Waiting
    file: str
    frame_bytes: int
    def __init__(self, send_from: _Optional[int] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., file: _Optional[str] = ..., frame_bytes: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("status", "kept_of", "differ")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    KEPT_OF_FIELD_NUMBER: _ClassVar[int]
    DIFFER_FIELD_NUMBER: _ClassVar[int]
    status: str
    kept_of: str
    differ: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, status: _Optional[str] = ..., kept_of: _Optional[str] = ..., differ: _Optional[_Iterable[str]] = ...) -> None: ...

class FilesHeader(_message.Message):
    __slots__ = ("session", "payload", "weights_file")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FILE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    payload: Payload
    weights_file: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., weights_file: _Optional[str] = ...) -> None: ...

class FilesPart(_message.Message):
    __slots__ = ("files", "data")
    FILES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    files: FilesHeader
    data: bytes
    def __init__(self, files: _Optional[_Union[FilesHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("session", "version", "metrics_json", "num_examples", "wait")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    session: Session
    version: int
    metrics_json: str
    num_examples: int
    wait: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., version: _Optional[int] = ..., metrics_json: _Optional[str] = ..., num_examples: _Optional[int] = ..., wait: bool = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("metrics_json", "stop", "waiting")
    METRICS_JSON_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    metrics_json: str
    stop: bool
    waiting: Waiting
    def __init__(self, metrics_json: _Optional[str] = ..., stop: bool = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ...) -> None: ...

class TunnelPart(_message.Message):
    __slots__ = ("session", "peer", "stream", "opened", "credit", "closed", "data")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    session: Session
    peer: str
    stream: str
    opened: str
    credit: int
    closed: bool
    data: bytes
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., peer: _Optional[str] = ..., stream: _Optional[str] = ..., opened: _Optional[str] = ..., credit: _Optional[int] = ..., closed: bool = ..., data: _Optional[bytes] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("session", "reason", "early", "stays")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EARLY_FIELD_NUMBER: _ClassVar[int]
    STAYS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    reason: str
    early: bool
    stays: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., reason: _Optional[str] = ..., early: bool = ..., stays: bool = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
