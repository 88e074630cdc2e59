// What the Node programs of this folder have in common: see told.py.
export const [URL, KEY, MODEL] = process.argv.slice(2)
export const QUESTION = 'What is the capital of France?'
export const STORY = 'Write a long story.'
export const ENDLESS = 900
export const SCHEMA = {
  type: 'object',
  properties: { city: { type: 'string', enum: ['Paris', 'Rome'] } },
  required: ['city'],
  additionalProperties: false,
}
export const ASKED = 'Weather in Paris?'
export const WEATHER = 'Sunny, 21 degrees.'

export async function run(steps) {
  for (const [step, take] of Object.entries(steps)) {
    process.stdout.write(JSON.stringify({ step, got: await take() }) + '\n')
  }
  for await (const _ of process.stdin);
  process.exit(0)
}
