"""The names that users may import: a list to change on purpose."""

from __future__ import annotations

PUBLIC = {
    "fl_adapters": """
        AbortedError ConfigError ConnectedSite ConnectionLostError CoordinateMedian Cyclic DPSGD Ditto FFALoRA FLoRA
        FedAdagrad FedAdam FedAvg FedAvgM FedBuff FedExLoRA FedIT FedNova FedProx FedSALoRA FedYogi
        FederationError FlexLoRA HandshakeError Job Krum NormBounding PermissionDeniedError PrivacyBudgetError
        Production ProofOfConcept ProtocolError QuorumError RoLoRA Scaffold Simulation Site SiteFailedError
        SiteTask StateMismatchError StoreError Sums Swarm TransferDamagedError TrimmedMean UpdateRefusedError
        __version__ connect open_run site sums
    """,
    "fl_adapters.hf": "FederatedCallback",
    "fl_adapters.keras": "FederatedCallback adapt",
    "fl_adapters.lightning": "FederatedCallback",
    "fl_adapters.torch": "FederatedLoop",
    "fl_adapters.monai": "FederatedHandler run_client_algo",
    "fl_adapters.xgboost": """
        FederatedCallback FederatedXGBClassifier FederatedXGBRanker FederatedXGBRegressor train
    """,
    "fl_adapters.sklearn": """
        CountVectorizer GaussianMixture GaussianNB GridSearchCV KBinsDiscretizer KMeans LabelEncoder
        LinearDiscriminantAnalysis LinearRegression LinearSVC LogisticRegression MaxAbsScaler MinMaxScaler
        MiniBatchKMeans MultinomialNB NearestCentroid OneHotEncoder OrdinalEncoder PCA PoissonRegressor
        QuantileTransformer Ridge RobustScaler SimpleImputer StandardScaler TargetEncoder TfidfTransformer
        TfidfVectorizer TruncatedSVD as_sklearn cross_val_score over
    """,
    "fl_adapters.partition": "Partition by_column by_feature by_label by_quantity iid",
    "fl_adapters.statistics": """
        Absence Categorical Histogram Numeric SiteStatistics Statistics describe describe_images
    """,
    "fl_adapters.evaluation": "Absence Evaluation ModelScores ReliabilityBin RocPoint Scores evaluate",
    "fl_adapters.testing": """
        AdapterCase AdapterExample Correct CorrectedLoop CorrectionCase CorrectionExample CrossSiteCase Death
        LocalFederation Outcome Place PlainLoop RestartCase ScoredExample Trained TrainingCase TrainingExample
        adapter_cases check_adapter check_training correction_cases cross_site_cases failing restart_cases
        training_cases
    """,
    "fl_runtime": "",  # not for users
}
