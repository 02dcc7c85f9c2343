"""``glmquant serve``: one model behind the HTTP APIs of THUDM's servers and of OpenAI's clients.

::

    HTTP (app, openai, legacy)  ->  conversation: messages to ids  ->  engine: queue, batch, tokens
                                <-  answers: text, tool calls      <-

One thread owns the model (`engine`). It advances every running request by one token a step, and reads newcomers'
prompts in chunks in the same forward pass (`runners`).
"""
