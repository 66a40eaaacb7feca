"""HTTP in the words of OpenAI and SGLang, in front of Triton's gRPC."""
