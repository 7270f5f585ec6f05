"""Answer over HTTP with OpenAI's Chat Completions, for programs beside the robot's own.

admission          who may ask, and how many at once
chat_request       JSON -> a question;  chat_documents: an answer -> JSON
picture_sources    data URIs and pages -> pixels
encoding           pixels -> visual tokens, in batches, remembered
caches             which KV cache goes on with a conversation
answering          answers written in threads
service            the parts together;  app: the routes
"""
