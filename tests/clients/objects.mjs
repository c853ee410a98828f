// Vercel's AI SDK asks a server for objects: node objects.mjs BASE_URL; prints what each call gave as JSON. It validates them itself.
import { createOpenAI } from '@ai-sdk/openai'
import { generateObject, generateText, Output, streamText, tool } from 'ai'
import { z } from 'zod'

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: 'none' })
const schema = z.object({ city: z.string().max(3), sunny: z.boolean(), level: z.enum(['low', 'high']) })
const get_weather = tool({ description: 'Weather of a city.', inputSchema: schema })
const out = {}
for (const [name, model] of Object.entries({ chat: openai.chat('tiny:eft'), responses: openai.responses('tiny:eft') })) {
  const providerOptions = { openai: { store: false, parallelToolCalls: false } }
  const settings = { model, prompt: 'How is the weather?', providerOptions, maxOutputTokens: 2000, maxRetries: 0 }
  const tools = { get_weather }
  const stream = streamText({ ...settings, tools, toolChoice: 'required' })
  await stream.consumeStream()
  const calls = [
    await generateText({ ...settings, tools, toolChoice: { type: 'tool', toolName: 'get_weather' } }),
    { toolCalls: await stream.toolCalls },
  ]
  out[name] = {
    object: (await generateObject({ ...settings, schema })).object,
    output: (await generateText({ ...settings, output: Output.object({ schema }) })).output,
    calls: calls.map(({ toolCalls }) => toolCalls.map((call) => [call.toolName, schema.parse(call.input), call.invalid ?? false])),
  }
}
console.log(JSON.stringify(out))
