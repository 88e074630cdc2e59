// OpenAI's SDK for Node over /v1/chat/completions and /v1/responses.
import OpenAI, { NotFoundError } from 'openai'
import { ASKED, ENDLESS, KEY, MODEL, QUESTION, run, SCHEMA, STORY, URL, WEATHER } from './told.mjs'

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, maxRetries: 0, timeout: 180_000 })
const said = (content) => ({ role: 'user', content })
const cold = { model: MODEL, temperature: 0 }

async function chat() {
  const answer = await client.chat.completions.create({ ...cold, messages: [said(QUESTION)], max_tokens: 20 })
  return answer.choices[0].message.content
}

async function stream() {
  let text = ''
  const events = await client.responses.create({ ...cold, input: QUESTION, max_output_tokens: 20, stream: true })
  for await (const event of events) if (event.type === 'response.output_text.delta') text += event.delta
  const chunks = await client.chat.completions.create({
    ...cold, messages: [said(QUESTION)], max_tokens: 20, stream: true,
  })
  let again = ''
  for await (const chunk of chunks) again += chunk.choices[0]?.delta?.content ?? ''
  return text === again ? text : `${text} / ${again}`
}

async function tools() {
  const weather = { name: 'weather', description: 'The weather in a city', parameters: SCHEMA }
  const offered = [{ type: 'function', function: weather }]
  const messages = [said(ASKED)]
  const first = await client.chat.completions
    .stream({ ...cold, messages, tools: offered, tool_choice: 'required', max_tokens: 120 })
    .finalChatCompletion()
  const message = first.choices[0].message
  const [call] = message.tool_calls
  messages.push(message, { role: 'tool', tool_call_id: call.id, content: WEATHER })
  const second = await client.chat.completions.create({ ...cold, messages, tools: offered, max_tokens: 20 })
  return [call.function.arguments, second.choices[0].message.content]
}

async function structured() {
  const answer = await client.responses.parse({
    ...cold, input: QUESTION, max_output_tokens: 40, text: { format: { type: 'json_schema', name: 'city', schema: SCHEMA } },
  })
  return JSON.parse(answer.output_text).city
}

async function error() {
  try {
    await client.responses.create({ model: 'nobody', input: QUESTION })
  } catch (refused) {
    if (refused instanceof NotFoundError) return refused.message
    throw refused
  }
  throw new Error('it was answered')
}

async function disconnect() {
  const chunks = await client.chat.completions.create({
    model: MODEL, messages: [said(STORY)], max_tokens: ENDLESS, stream: true, ignore_eos: true,
  })
  let seen = 0
  for await (const _ of chunks) if (++seen === 3) break
  chunks.controller.abort()
  return seen
}

await run({ chat, stream, tools, structured, error, disconnect })
