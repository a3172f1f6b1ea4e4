"""The trained model is exported for TensorFlow, which is not here."""


class JaxModule:
    def __init__(self, model, apply):
        pass


class ServingConfig:
    def __init__(self, name, input_signature):
        pass


class ExportManager:
    def __init__(self, module, configs):
        pass

    def save(self, folder):
        pass
