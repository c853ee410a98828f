// Vercel's AI SDK against a server: node agent.mjs BASE_URL; prints what each call gave as JSON.
import { createOpenAI } from '@ai-sdk/openai'
import { generateText, stepCountIs, streamText, tool } from 'ai'
import { z } from 'zod'

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: 'none' })
const get_weather = tool({
  description: 'Weather of a city.',
  inputSchema: z.object({ city: z.string(), days: z.array(z.number()) }),
  execute: async ({ city }) => `sunny in ${city}`,
})
const prompt = 'How is the weather?'
const out = {}
for (const [name, model] of Object.entries({ chat: openai.chat('tiny'), responses: openai.responses('tiny') })) {
  const providerOptions = { openai: { store: false } } // else it refers to stored items
  const settings = { model, prompt, providerOptions, tools: { get_weather }, stopWhen: stepCountIs(3), maxRetries: 0 }
  const whole = await generateText(settings)
  const stream = streamText(settings)
  let text = ''
  for await (const piece of stream.textStream) text += piece
  const steps = await stream.steps
  out[name] = {
    text: whole.text,
    calls: whole.steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input])),
    reasons: whole.steps.map((step) => step.finishReason),
    streamed: text,
    streamedCalls: steps.flatMap((step) => step.toolCalls.map((call) => [call.toolName, call.input])),
  }
}
console.log(JSON.stringify(out))
