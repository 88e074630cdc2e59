// Vercel's ai with @ai-sdk/openai-compatible over /v1/chat/completions.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { APICallError, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from 'ai'
import { ASKED, ENDLESS, KEY, MODEL, QUESTION, run, SCHEMA, STORY, URL, WEATHER } from './told.mjs'

const provider = createOpenAICompatible({
  name: 'pomarium', baseURL: `${URL}/v1`, apiKey: KEY, supportsStructuredOutputs: true,
})
const model = provider(MODEL)
const cold = { model, temperature: 0, maxRetries: 0 }

async function chat() {
  return (await generateText({ ...cold, prompt: QUESTION, maxOutputTokens: 20 })).text
}

async function stream() {
  let text = ''
  for await (const piece of streamText({ ...cold, prompt: QUESTION, maxOutputTokens: 20 }).textStream) text += piece
  return text
}

async function tools() {
  const weather = tool({ description: 'The weather in a city', inputSchema: jsonSchema(SCHEMA), execute: async () => WEATHER })
  const answer = await generateText({
    ...cold, prompt: ASKED, tools: { weather }, maxOutputTokens: 120, stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
  })
  return [answer.steps[0].toolCalls[0].input, answer.text]
}

async function structured() {
  const answer = await generateText({
    ...cold, prompt: QUESTION, maxOutputTokens: 40, output: Output.object({ schema: jsonSchema(SCHEMA) }),
  })
  return answer.output.city
}

async function error() {
  try {
    await generateText({ model: provider('nobody'), prompt: QUESTION, maxRetries: 0 })
  } catch (refused) {
    if (APICallError.isInstance(refused) && refused.statusCode === 404) return refused.message
    throw refused
  }
  throw new Error('it was answered')
}

async function disconnect() {
  const left = new AbortController()
  const endless = { pomarium: { ignore_eos: true } }
  const chunks = streamText({
    ...cold, prompt: STORY, maxOutputTokens: ENDLESS, abortSignal: left.signal, providerOptions: endless,
  })
  let seen = 0
  for await (const _ of chunks.textStream) if (++seen === 3) break
  left.abort()
  return seen
}

await run({ chat, stream, tools, structured, error, disconnect })
